"""Plain-torch reference of `linear`, the definition that every kernel is compared with."""

from __future__ import annotations

import torch.nn.functional as F

from icae_fast.ops._precision import compute_dtype


def linear(x, weight, bias, *, upcast=True):
    """Compute `linear`; `icae_fast.ops.linear` documents the formula and the shapes."""
    dtype = compute_dtype(x, upcast)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
