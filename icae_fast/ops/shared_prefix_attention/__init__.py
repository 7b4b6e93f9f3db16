"""Attention of rows with a common prefix of keys."""

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
    """Attend to shared segments of keys and to the tail of each row.

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j    over the row's keys j up to query i's position

    A row's keys are those of the segments that it reads, in order, and then its tail. A segment is read once for all of
    its rows, in one product with their queries. The partial results of a query are merged by their log-sum-exps,

        out = sum_p exp(lse_p - lse) out_p,    lse = log sum_p exp(lse_p).

    The rows that read a segment must be neighbours, as rows of a prefix tree are in depth-first order. A batch may mix
    rows with different prefixes and rows without one.

    Args:
        q: (Tq, Hq, D) fp32, bf16 or fp64, row after row; a row's queries are at the positions of the last keys of its
            tail.
        k, v: (N, Hkv, D), the tails of all rows; Hq is a multiple of Hkv (GQA), and keys are not expanded.
        cu_seqlens_q: (R + 1,) int32, start of each row's queries.
        tail_starts, tail_lengths: (R,) int32: row r's tail is k[start : start + length], and holds at least the
            keys of the row's queries.
        prefix_keys, prefix_values: (S_s, Hkv, D) of each segment.
        prefix_rows: (first row, one past the last row) that read each segment. The same number of keys must precede a
            segment in all of these rows.
        scale: factor of the scores, usually D ** -0.5.
        window: number of keys, its own included, that a query sees (sliding window); 0 for all.

    Returns:
        (Tq, Hq, D) in q's dtype.

    Raises:
        BackendError: a tensor requires a gradient, which no backend computes.

    Source: Juravsky et al., arXiv 2402.05099 (Hydragen), for the decomposition; Dao et al., Flash-Decoding, for the
    merge.
    """
    check_frozen("shared_prefix_attention", q=q, k=k, v=v)
    rows = [i for pair in prefix_rows for i in pair]
    return _OP(
        q, k, v, cu_seqlens_q, tail_starts, tail_lengths, list(prefix_keys), list(prefix_values), rows, scale, window
    )
