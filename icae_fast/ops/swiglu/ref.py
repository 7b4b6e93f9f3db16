"""Plain-torch reference of `swiglu` and its gradient, the definition that every kernel is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icae_fast.ops._precision import compute_dtype


def _gate_up(x, weight, bias, dtype):
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def swiglu(x, weight, bias, keep, *, upcast=True):
    """Compute `swiglu`; `icae_fast.ops.swiglu` documents the formula and the shapes."""
    gate_up = _gate_up(x, weight, bias, compute_dtype(x, upcast))
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype), gate_up.to(x.dtype) if keep else x.new_empty(0)


def swiglu_backward(dy, x, weight, bias, gate_up, *, upcast=True):
    """Return the gradient of x; the weights are frozen. An empty `gate_up` is recomputed."""
    dtype = compute_dtype(x, upcast)
    kept = gate_up.to(dtype) if gate_up.numel() else _gate_up(x, weight, bias, dtype)
    gate, up = kept.chunk(2, dim=-1)
    s, dy = gate.sigmoid(), dy.to(dtype)
    gradient = torch.cat((dy * up * s * (1 + gate * (1 - s)), dy * gate * s), dim=-1)
    return (gradient @ weight.to(dtype)).to(x.dtype)
