"""The gated half of a LLaMA MLP as one op: packed gate-up projection and SwiGLU."""

from __future__ import annotations

import torch

from icae_fast.ops._declare import Op, check_frozen
from icae_fast.ops.swiglu.spec import BACKWARD_SPEC, SPEC

__all__ = ["BACKWARD_SPEC", "SPEC", "swiglu"]

_OP = Op("swiglu")


def swiglu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, recompute: bool = False
) -> torch.Tensor:
    """Project to gate and up in one product and multiply `silu(gate)` by up.

        y = silu(x W_gate^T + b_gate) * (x W_up^T + b_up)

    The weights are frozen: only x gets a gradient. For it the (T, 2 m) products are kept if x requires a gradient, or
    recomputed.

    Args:
        x: (T, d) fp32, bf16 or fp64.
        weight: (2 m, d) W_gate above W_up.
        bias: (2 m,) or None.
        recompute: keep only x for the backward, which then computes the product again.

    Returns:
        y (T, m) in x's dtype.

    Raises:
        BackendError: weight or bias requires a gradient, which no backend computes.

    Source: Shazeer, arXiv 2002.05202; `LlamaMLP` of transformers.
    """
    check_frozen("swiglu", weight=weight, bias=bias)
    keep = torch.is_grad_enabled() and x.requires_grad and not recompute
    return _OP(x, weight, bias, keep)[0]
