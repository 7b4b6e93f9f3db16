"""Compute dtype of the references."""

from __future__ import annotations

import torch


def compute_dtype(x: torch.Tensor, upcast: bool) -> torch.dtype:
    """Return fp32 for narrower inputs, the kernels' accumulation dtype; x's dtype if it is wide or without `upcast`."""
    return torch.float32 if upcast and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
