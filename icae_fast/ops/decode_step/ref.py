"""Plain-torch reference of `decode_step`, the definition that every kernel is compared with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from icae_fast.ops._precision import compute_dtype
from icae_fast.ops.decode_step.arguments import StepArguments
from icae_fast.ops.shared_prefix_attention.ref import shared_prefix_attention

MATRICES = 4  # a layer: qkv, output, gate and up, down


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _norm_and_rope(
    y: torch.Tensor, norm: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Return heads (R, H, D) normalised and rotated."""
    y = y if norm is None else _norm(y, norm, eps)
    first, second = y.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def decode_step(*arguments: Any, upcast: bool = True, **named: Any) -> torch.Tensor:
    """Compute `icae_fast.ops.decode_step`, whose docstring has the formula and the shapes, of `StepArguments`."""
    a = StepArguments(*arguments, **named)
    dtype, narrow, eps = compute_dtype(a.embedding, upcast), a.embedding.dtype, a.norm_eps
    last = (a.tail_starts + a.tail_lengths - 1).to(torch.int64)
    cu = torch.arange(len(a.tokens) + 1, dtype=torch.int32, device=a.tokens.device)
    cos, sin = a.cos[:, None].to(dtype), a.sin[:, None].to(dtype)

    def project(x: torch.Tensor, i: int) -> torch.Tensor:  # the operand of a product is rounded to the weights' dtype
        bias = a.biases[i]
        return F.linear(x.to(narrow).to(dtype), a.matrices[i].to(dtype), None if bias is None else bias.to(dtype))

    h = a.embedding[a.tokens].to(dtype)
    for i, window in enumerate(a.windows):
        first = MATRICES * i
        y = project(_norm(h, a.norms[2 * i].to(dtype), eps), first).unflatten(-1, (-1, a.tail_keys.shape[-1]))
        q, k, v = y.split((a.num_q_heads, a.num_kv_heads, a.num_kv_heads), dim=1)
        norms = a.qk_norms[i]
        q_norm, k_norm = (None, None) if norms is None else norms.to(dtype).unbind()
        q = _norm_and_rope(q, q_norm, eps, cos, sin).to(narrow)
        a.tail_keys[i, last] = _norm_and_rope(k, k_norm, eps, cos, sin).to(narrow)
        a.tail_values[i, last] = v.to(narrow)
        attended = shared_prefix_attention(
            q, a.tail_keys[i], a.tail_values[i], cu, a.tail_starts, a.tail_lengths, [t[i] for t in a.prefix_keys],
            [t[i] for t in a.prefix_values], a.prefix_rows, a.scale, window, upcast=upcast,
        )  # fmt: skip
        h = h + project(attended.flatten(1), first + 1)
        gate, up = project(_norm(h, a.norms[2 * i + 1].to(dtype), eps), first + 2).chunk(2, dim=-1)
        h = h + project(F.silu(gate) * up, first + 3)
    logits = F.linear(_norm(h, a.norms[-1].to(dtype), eps).to(narrow).to(dtype), a.head.to(dtype))
    return logits.to(torch.float64 if narrow == torch.float64 else torch.float32)
