"""Lists of the blocks of queries or keys that attention kernels are launched for, the most work first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icae_fast.ops._layout import upload
from icae_fast.ops._lengths import known

# Columns of a work list: the row, the block's first query or key within it, and start and number of the row's queries
# and keys.
COLUMNS = ("row", "first", "q_begin", "q_len", "k_begin", "k_len")


def query_work(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, block: int, pack: int = 1) -> torch.Tensor:
    """Return blocks of queries that cover every row, (n, 6) int32 on the device of `cu_seqlens_q`.

    Args:
        cu_seqlens_q, cu_seqlens_k: (rows + 1,) start of each row's queries and keys.
        block: queries in a block.
        pack: heads that a block holds each query for, interleaved; `block` and `first` count queries times heads.
    """
    return _memoised(cu_seqlens_q, cu_seqlens_k, ("queries", block, pack))


def key_work(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, block: int) -> torch.Tensor:
    """Return blocks of `block` keys that cover every row, (n, 6) int32 on the device of `cu_seqlens_q`."""
    return _memoised(cu_seqlens_q, cu_seqlens_k, ("keys", block, 1))


def _memoised(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, wanted: tuple[str, int, int]) -> torch.Tensor:
    # Cached for the layers of a batch; freed with the tensors, or when their contents change.
    of_q = known(cu_seqlens_q)
    of_k = of_q if cu_seqlens_k is cu_seqlens_q else known(cu_seqlens_k)
    lists = of_q.tables.get(of_k)
    if lists is None:
        lists = of_q.tables[of_k] = {}
    if wanted not in lists:
        lists[wanted] = upload(blocks(of_q.values, of_k.values, *wanted), cu_seqlens_q.device)
    return lists[wanted]


def blocks(cu_q: Sequence[int], cu_k: Sequence[int], of: str, block: int, pack: int = 1) -> torch.Tensor:
    """Return the list on the host; see `query_work` and `key_work`."""
    q_starts, k_starts = torch.tensor(cu_q, dtype=torch.int32), torch.tensor(cu_k, dtype=torch.int32)
    q_len, k_len = q_starts.diff(), k_starts.diff()
    lengths = q_len * pack if of == "queries" else k_len
    counts = (lengths + (block - 1)) // block
    rows = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(counts)
    first = (torch.arange(len(rows), dtype=torch.int32) - (counts.cumsum(0) - counts)[rows]) * block
    q_begin, q_len, k_begin, k_len = (t[rows] for t in (q_starts, q_len, k_starts, k_len))
    if of == "queries":
        cost = (first + block) // pack + k_len - q_len  # keys up to the last query's position
    else:
        cost = q_len - (first + q_len - k_len).clamp(min=0)  # queries at or behind the first key
    table = torch.stack([rows, first, q_begin, q_len, k_begin, k_len], 1).to(torch.int32)
    return table[cost.argsort(descending=True, stable=True)].contiguous()
