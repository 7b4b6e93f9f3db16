"""`rms_norm` and its gradient in plain torch: the definition that every kernel is compared with."""

from __future__ import annotations

import torch

from icae_fast.ops._precision import compute_dtype


def rms_norm(x, residual, weight, eps, *, upcast=True):
    """See `icae_fast.ops.rms_norm` for the formula and the shapes."""
    dtype = compute_dtype(x, upcast)
    total = x if residual is None else (x.to(dtype) + residual.to(dtype)).to(x.dtype)
    wide = total.to(dtype)
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return y.to(x.dtype), x.new_empty(0) if residual is None else total


def rms_norm_backward(dy, dsum, total, weight, eps, *, upcast=True):
    """The gradient of x, and of the residual: what comes through the norm and what comes through the sum."""
    dtype = compute_dtype(total, upcast)
    wide, grad = total.to(dtype), dy.to(dtype) * weight.to(dtype)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    dx = inverse * grad - wide * inverse.pow(3) * (grad * wide).mean(-1, keepdim=True)
    return (dx if dsum is None else dx + dsum.to(dtype)).to(total.dtype, copy=True)
