"""Packed QKV projection with LoRA on q and v, optional q/k norm, and RoPE on q and k, as one op."""

from __future__ import annotations

import torch

from icae_fast.ops._declare import Op, check_frozen
from icae_fast.ops.lora_qkv_rope.spec import BACKWARD_SPEC, SPEC

__all__ = ["BACKWARD_SPEC", "SPEC", "lora_qkv_rope"]

_OP = Op("lora_qkv_rope")


def lora_qkv_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    lora_scale: float = 1.0,
    qk_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    q_rows: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project packed rows to the queries, keys and values of attention.

        q = RoPE(norm_q(x_q W_q^T + b_q + s * drop_q(x_q) A_q^T B_q^T)),    x_q = x[q_rows]
        k = RoPE(norm_k(x W_k^T + b_k))
        v = x W_v^T + b_v + s * drop_v(x) A_v^T B_v^T

    RoPE rotates the two halves of a head, as in LLaMA. The base weights are frozen: x, lora_a and lora_b get gradients,
    and the backward recomputes `x A^T`.

    Args:
        x: (T, d) fp32, bf16 or fp64, on a GPU fp32, fp16 or bf16; rows of any number of spans, packed.
        weight: ((Hq + 2 Hkv) D, d), W_q above W_k above W_v.
        bias: ((Hq + 2 Hkv) D,) or None.
        lora_a: (2 r, d), A_q above A_v, or None for no adapter.
        lora_b: ((Hq + Hkv) D, r), B_q above B_v, or None for no adapter.
        cos, sin: (T, D / 2) fp32 (fp64 with fp64), the RoPE tables at each row's position; 1 and 0 if there is
            no RoPE.
        num_q_heads, num_kv_heads: Hq and Hkv.
        lora_scale: s = alpha / r.
        qk_norm: (2, D) RMS-norm weights of q and k over the head (Qwen3), or None.
        norm_eps: epsilon of that norm.
        q_rows: (Tq,) int64, the rows that get a query (memory tokens in the last layer), each at most once; None for
            all rows.
        dropout_p: LoRA dropout probability, independent for q and v; 0 outside training.
        dropout_seed: () int64 seed of the masks (`icae_fast.ops._dropout`); None for no dropout.

    Returns:
        q (Tq, Hq, D), k (T, Hkv, D), v (T, Hkv, D), contiguous, in x's dtype.

    Raises:
        BackendError: weight, bias or qk_norm requires a gradient, which no backend computes.

    Source: Ge et al., arXiv 2307.06945, section 2; Hu et al., arXiv 2106.09685 (LoRA).
    """
    check_frozen("lora_qkv_rope", weight=weight, bias=bias, qk_norm=qk_norm)
    return _OP(
        x, weight, bias, lora_a, lora_b, cos, sin, qk_norm, q_rows, dropout_seed,
        num_q_heads, num_kv_heads, lora_scale, norm_eps, dropout_p,
    )  # fmt: skip
