"""Packed rows: row boundaries of a batch and positions of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from icae_fast.ops._lengths import remember


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Row boundaries and positions of a packed batch.

    Args:
        positions: (T,) int64 position id of every token.
        cu_seqlens: (n + 1,) int32 start of every row, then the end.
        max_seqlen: length of the longest row.
        out_rows: (Tq,) int64 tokens whose final hidden state is requested, None for all.
        cu_seqlens_out: (n + 1,) int32 start of every row among `out_rows`, None if that is None.
        max_seqlen_out: largest number of `out_rows` in one row.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    out_rows: torch.Tensor | None = None
    cu_seqlens_out: torch.Tensor | None = None
    max_seqlen_out: int = 0

    def to(self, device: torch.device) -> PackedRows:
        """Return the layout with its tensors on `device`, keeping host copies of the boundaries for kernel launches."""
        values: dict[str, Any] = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in vars(self).items()}
        for name in ("cu_seqlens", "cu_seqlens_out"):
            if values[name] is not None and values[name] is not getattr(self, name):
                remember(values[name], getattr(self, name).tolist())
        return PackedRows(**values)


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """Return the (n + 1,) int32 cumulative sum of row lengths, starting with 0."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def pack_behind(starts: Sequence[int], counts: Sequence[int]) -> PackedRows:
    """Return the layout of rows that continue at positions `starts` with `counts` tokens each.

    Only the last hidden state of each row is requested.
    """
    cu = cumulative(counts)
    return PackedRows(
        positions=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]),
        cu_seqlens=cu,
        max_seqlen=max(counts),
        out_rows=cu[1:].to(torch.int64) - 1,
        cu_seqlens_out=torch.arange(len(counts) + 1, dtype=torch.int32),
        max_seqlen_out=1,
    )


def pack_ends(lengths: Sequence[int], counts: Sequence[int]) -> PackedRows:
    """Return the layout of rows of `lengths` tokens, the last `counts` hidden states of each being requested.

    Attention aligns queries with the end of a row, so only a row's last tokens can be selected.
    """
    cu, cu_out = cumulative(lengths), cumulative(counts)
    return PackedRows(
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=cu,
        max_seqlen=max(lengths),
        out_rows=torch.cat([torch.arange(end - n, end) for end, n in zip(cu[1:].tolist(), counts, strict=True)]),
        cu_seqlens_out=cu_out,
        max_seqlen_out=max(counts),
    )


def token_budget_on(device: torch.device, given: int | None = None) -> int:
    """Return `given`, or by default the tokens of a micro-batch without a backward on a device.

    With few rows a GPU computes a layer faster than the host launches it. On the CPU more rows save no time, and the
    activations of fewer rows stay in the caches.
    """
    return (32768 if device.type == "cuda" else 4096) if given is None else given


def span_tokens_on(device: torch.device, given: int | None = None) -> int:
    """Return `given`, or by default the tokens of a micro-batch of spans in training, kept for a backward."""
    return (8192 if device.type == "cuda" else 1024) if given is None else given


def micro_batches(costs: Sequence[int], budget: int) -> Iterator[range]:
    """Yield consecutive ranges whose costs sum to at most `budget`; an item over the budget gets a range of its own."""
    start = total = 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > budget:
            yield range(start, i)
            start, total = i, 0
        total += cost
    if start < len(costs):
        yield range(start, len(costs))
