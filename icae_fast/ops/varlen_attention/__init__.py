"""Causal attention over packed rows of any lengths."""

from __future__ import annotations

import torch

from icae_fast.ops._declare import Op
from icae_fast.ops.varlen_attention.backends import attention_backend, set_attention_backend
from icae_fast.ops.varlen_attention.spec import BACKWARD_SPEC, SPEC

__all__ = ["BACKWARD_SPEC", "SPEC", "attention_backend", "set_attention_backend", "varlen_attention"]

_OP = Op("varlen_attention")


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    window: int = 0,
    seqused_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each row: block diagonal over rows, causal and bottom-right aligned in a row.

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j    over keys j <= i + Lk - Lq  (and > that - window)

    Query i of a row with Lq queries and Lk keys has position i + Lk - Lq, so Lq < Lk covers the last layer's
    memory-only queries, prefill after a cached prefix, and decoding. The result of a query without keys is 0, and its
    log-sum-exp -inf.

    Args:
        q: (Tq, Hq, D) fp32, bf16 or fp64, on CUDA fp32, fp16 or bf16; any strides with the last one 1.
        k, v: (Tk, Hkv, D); Hq is a multiple of Hkv (GQA), and keys are not expanded.
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32, start of each row's queries and keys.
        max_seqlen_q, max_seqlen_k: upper bounds of the row lengths, by which kernels size their work.
        scale: factor of the scores, usually D ** -0.5.
        window: number of keys, its own included, that a query sees (sliding window); 0 for all.
        seqused_k: (n,) int32, number of valid keys of each row (a cache with spare capacity); None for all.

    Returns:
        out (Tq, Hq, D) in q's dtype and lse (Hq, Tq) fp32 (fp64 with fp64), both differentiable.

    On CUDA `set_attention_backend` selects the library that runs it.

    Source: Dao, arXiv 2307.08691 (FlashAttention-2); varlen arguments as in the flash-attn package.
    """
    return _OP(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, scale, window)
