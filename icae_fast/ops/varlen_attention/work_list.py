"""Which blocks of queries or keys there are: kernels are launched for these alone, the longest first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icae_fast.ops._layout import upload
from icae_fast.ops._lengths import known

# Columns of a work list: the row, the block's first query or key within it, where the row's queries and keys begin
# in their tensors, and how many it has.
COLUMNS = ("row", "first", "q_begin", "q_len", "k_begin", "k_len")


def query_work(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, block: int, pack: int = 1) -> torch.Tensor:
    """(n, 6) int32 on the device of `cu_seqlens_q`: blocks of `block` queries that cover every row's.

    Args:
        cu_seqlens_q, cu_seqlens_k: (rows + 1,) where each row's queries and keys begin.
        block: queries in a block.
        pack: heads for which each query stands in a block, one after the other; `first` counts all of them.
    """
    return _memoised(cu_seqlens_q, cu_seqlens_k, ("queries", block, pack))


def key_work(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, block: int) -> torch.Tensor:
    """(n, 6) int32 on the device of `cu_seqlens_q`: blocks of `block` keys that cover every row's."""
    return _memoised(cu_seqlens_q, cu_seqlens_k, ("keys", block, 1))


def _memoised(cu_seqlens_q, cu_seqlens_k, wanted):
    # Made once for all layers of a batch, and gone with the tensors or what they held.
    of_q = known(cu_seqlens_q)
    of_k = of_q if cu_seqlens_k is cu_seqlens_q else known(cu_seqlens_k)
    lists = of_q.tables.get(of_k)
    if lists is None:
        lists = of_q.tables[of_k] = {}
    if wanted not in lists:
        lists[wanted] = upload(blocks(of_q.values, of_k.values, *wanted), cu_seqlens_q.device)
    return lists[wanted]


def blocks(cu_q: Sequence[int], cu_k: Sequence[int], of: str, block: int, pack: int = 1) -> torch.Tensor:
    """The list on the host; see `query_work` and `key_work`."""
    cu_q, cu_k = torch.tensor(cu_q, dtype=torch.int32), torch.tensor(cu_k, dtype=torch.int32)
    q_len, k_len = cu_q.diff(), cu_k.diff()
    lengths = q_len * pack if of == "queries" else k_len
    counts = (lengths + (block - 1)) // block
    rows = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(counts)
    first = (torch.arange(len(rows), dtype=torch.int32) - (counts.cumsum(0) - counts)[rows]) * block
    q_begin, q_len, k_begin, k_len = (t[rows] for t in (cu_q, q_len, cu_k, k_len))
    if of == "queries":
        cost = (first + block) // pack + k_len - q_len  # keys up to the last query's
    else:
        cost = q_len - (first + q_len - k_len).clamp(min=0)  # queries from the first key on
    table = torch.stack([rows, first, q_begin, q_len, k_begin, k_len], 1).to(torch.int32)
    return table[cost.argsort(descending=True, stable=True)].contiguous()
