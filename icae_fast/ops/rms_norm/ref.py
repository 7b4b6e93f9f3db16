"""Plain-torch reference of `rms_norm` and its gradient, the definition that every kernel is compared with."""

from __future__ import annotations

import torch

from icae_fast.ops._precision import compute_dtype


def rms_norm(x, residual, weight, eps, *, upcast=True):
    """Compute `rms_norm`; `icae_fast.ops.rms_norm` documents the formula and the shapes."""
    dtype = compute_dtype(x, upcast)
    total = x if residual is None else (x.to(dtype) + residual.to(dtype)).to(x.dtype)
    wide = total.to(dtype)
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return y.to(x.dtype), x.new_empty(0) if residual is None else total


def rms_norm_backward(dy, dsum, total, weight, eps, *, upcast=True):
    """Return the gradient of x, which is also the residual's: the sum of those through the norm and through the sum."""
    dtype = compute_dtype(total, upcast)
    wide, grad = total.to(dtype), dy.to(dtype) * weight.to(dtype)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    dx = inverse * grad - wide * inverse.pow(3) * (grad * wide).mean(-1, keepdim=True)
    return (dx if dsum is None else dx + dsum.to(dtype)).to(total.dtype, copy=True)
