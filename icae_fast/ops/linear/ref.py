"""`linear` in plain torch: the definition that every kernel is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x, weight, bias, *, upcast=True):
    """See `icae_fast.ops.linear` for the formula and the shapes."""
    narrow = upcast and x.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if narrow else x.dtype
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
