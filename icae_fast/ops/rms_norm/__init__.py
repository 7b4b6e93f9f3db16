"""RMS norm with residual add."""

from __future__ import annotations

import torch

from icae_fast.ops._declare import Op, check_frozen
from icae_fast.ops.rms_norm.spec import BACKWARD_SPEC, SPEC

__all__ = ["BACKWARD_SPEC", "SPEC", "rms_norm"]

_OP = Op("rms_norm")


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual stream and normalise the sum, in one read and one write of each tensor.

        total = x + residual
        y     = total / sqrt(mean(total^2) + eps) * weight

    Statistics of the rounded total are accumulated in fp32 (fp64 for fp64), and y is rounded once. The weight is
    frozen. The backward adds the gradients through y and through the total in the same pass.

    Args:
        x: (T, d) fp32, bf16 or fp64.
        weight: (d,).
        eps: added to the mean square.
        residual: (T, d), or None.

    Returns:
        y (T, d) and total (T, d), which is x itself without a residual.

    Raises:
        BackendError: weight requires a gradient, which no backend computes.

    Source: Zhang and Sennrich, arXiv 1910.07467; `LlamaRMSNorm` of transformers.
    """
    check_frozen("rms_norm", weight=weight)
    y, total = _OP(x, residual, weight, eps)
    return y, x if residual is None else total
