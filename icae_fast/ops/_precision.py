"""What the references compute in."""

from __future__ import annotations

import torch


def compute_dtype(x: torch.Tensor, upcast: bool) -> torch.dtype:
    """fp32 for narrower inputs, as the kernels sum up; x's own dtype where that is wide, or without `upcast`."""
    return torch.float32 if upcast and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
