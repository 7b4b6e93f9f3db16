"""`decode_step` in plain torch: the definition that every kernel is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icae_fast.ops._precision import compute_dtype
from icae_fast.ops.shared_prefix_attention.ref import shared_prefix_attention

MATRICES = 4  # a layer: qkv, output, gate and up, down


def _norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _turn(y, norm, eps, cos, sin):
    """Norm and RoPE of heads (R, H, D)."""
    y = y if norm is None else _norm(y, norm, eps)
    first, second = y.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def decode_step(
    tokens, embedding, norms, matrices, biases, qk_norms, head, cos, sin, tail_keys, tail_values,
    tail_starts, tail_lengths, prefix_keys, prefix_values, prefix_rows, num_q_heads, num_kv_heads, scale, norm_eps,
    windows, *, upcast=True,
):  # fmt: skip
    """See `icae_fast.ops.decode_step` for the formula and the shapes."""
    dtype, narrow = compute_dtype(embedding, upcast), embedding.dtype
    last = (tail_starts + tail_lengths - 1).to(torch.int64)
    cu = torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device)
    cos, sin = cos[:, None].to(dtype), sin[:, None].to(dtype)

    def project(x, i):  # what a product reads is rounded to the weights' dtype
        bias = biases[i]
        return F.linear(x.to(narrow).to(dtype), matrices[i].to(dtype), None if bias is None else bias.to(dtype))

    h = embedding[tokens].to(dtype)
    for i, window in enumerate(windows):
        first = MATRICES * i
        y = project(_norm(h, norms[2 * i].to(dtype), norm_eps), first).unflatten(-1, (-1, tail_keys.shape[-1]))
        q, k, v = y.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
        q_norm, k_norm = (None, None) if qk_norms[i] is None else qk_norms[i].to(dtype).unbind()
        q = _turn(q, q_norm, norm_eps, cos, sin).to(narrow)
        tail_keys[i, last] = _turn(k, k_norm, norm_eps, cos, sin).to(narrow)
        tail_values[i, last] = v.to(narrow)
        attended = shared_prefix_attention(
            q, tail_keys[i], tail_values[i], cu, tail_starts, tail_lengths, [t[i] for t in prefix_keys],
            [t[i] for t in prefix_values], prefix_rows, scale, window, upcast=upcast,
        )  # fmt: skip
        h = h + project(attended.flatten(1), first + 1)
        gate, up = project(_norm(h, norms[2 * i + 1].to(dtype), norm_eps), first + 2).chunk(2, dim=-1)
        h = h + project(F.silu(gate) * up, first + 3)
    logits = F.linear(_norm(h, norms[-1].to(dtype), norm_eps).to(narrow).to(dtype), head.to(dtype))
    return logits.to(torch.float64 if narrow == torch.float64 else torch.float32)
