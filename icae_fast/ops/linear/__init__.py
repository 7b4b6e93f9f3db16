"""A projection with frozen weights."""

from __future__ import annotations

import torch

from icae_fast.ops._declare import Op, check_frozen
from icae_fast.ops.linear.spec import SPEC

__all__ = ["SPEC", "linear"]

_OP = Op("linear")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `y = x W^T + b` with frozen W and b: only x gets a gradient, and x is not kept for it.

    Args:
        x: (T, d) fp32, bf16 or fp64.
        weight: (n, d).
        bias: (n,) or None.

    Returns:
        y (T, n) in x's dtype, accumulated in fp32 (fp64 for fp64).

    Raises:
        BackendError: weight or bias requires a gradient, which no backend computes.
    """
    check_frozen("linear", weight=weight, bias=bias)
    return _OP(x, weight, bias)
