"""Attention of rows that share the keys they begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icae_fast.ops._declare import Op, check_frozen
from icae_fast.ops.shared_prefix_attention.spec import SPEC

__all__ = ["SPEC", "shared_prefix_attention"]

_OP = Op("shared_prefix_attention")


def shared_prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    tail_starts: torch.Tensor,
    tail_lengths: torch.Tensor,
    prefix_keys: Sequence[torch.Tensor],
    prefix_values: Sequence[torch.Tensor],
    prefix_rows: Sequence[tuple[int, int]],
    *,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Attend to shared segments of keys and to each row's own tail.

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j    over all keys j of the row up to query i's own

    A row's keys are those of the segments that it reads, in their order, and then its tail. Segments are read once
    for all their rows: the queries of all rows make one product with them, and the parts of a query's result are
    merged by their log-sum-exps,

        out = sum_p exp(lse_p - lse) out_p,    lse = log sum_p exp(lse_p).

    Rows of a prefix tree in depth-first order read each node by neighbouring rows, which is what this takes; rows
    with different prefixes, or none, may stand in one batch.

    Args:
        q: (Tq, Hq, D) fp32, bf16 or fp64; row after row, the last queries of a row belong to the last keys of its
            tail.
        k, v: (N, Hkv, D), where the tails are; Hq is a multiple of Hkv (GQA), and nothing is expanded.
        cu_seqlens_q: (R + 1,) int32, where each row's queries begin.
        tail_starts, tail_lengths: (R,) int32: row r's tail is k[start : start + length], and holds at least the
            keys of its queries.
        prefix_keys, prefix_values: (S_s, Hkv, D) of each segment.
        prefix_rows: (first row, one after the last row) that read each segment. Rows that read a segment together
            must have read as many keys before it.
        scale: factor of the scores, usually D ** -0.5.
        window: number of keys, its own included, that a query sees (sliding window); 0 for all.

    Returns:
        (Tq, Hq, D) in q's dtype.

    Raises:
        BackendError: a tensor asks for a gradient, of which there is none.

    Source: Juravsky et al., arXiv 2402.05099 (Hydragen), for the decomposition; Dao et al., Flash-Decoding, for the
    merge.
    """
    check_frozen("shared_prefix_attention", q=q, k=k, v=v)
    rows = [i for pair in prefix_rows for i in pair]
    return _OP(
        q, k, v, cu_seqlens_q, tail_starts, tail_lengths, list(prefix_keys), list(prefix_values), rows, scale, window
    )
