"""Packed rows: where the rows of a batch begin and at which positions their tokens stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from icae_fast.ops._lengths import remember


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of a packed batch begin and where their tokens stand.

    Args:
        positions: (T,) int64 position id of every token.
        cu_seqlens: (n + 1,) int32 start of every row.
        max_seqlen: length of the longest row.
        out_rows: (Tq,) int64 rows whose final hidden state is asked for, None for all.
        cu_seqlens_out: (n + 1,) int32 start of every row among `out_rows`, None when that is None.
        max_seqlen_out: the most that one row has among `out_rows`.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    out_rows: torch.Tensor | None = None
    cu_seqlens_out: torch.Tensor | None = None
    max_seqlen_out: int = 0

    def to(self, device: torch.device) -> PackedRows:
        """The same with its tensors on `device`; kernels go on knowing where rows begin without asking it."""
        values = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in vars(self).items()}
        for name in ("cu_seqlens", "cu_seqlens_out"):
            if values[name] is not None and values[name] is not getattr(self, name):
                remember(values[name], getattr(self, name).tolist())
        return PackedRows(**values)


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """(n + 1,) int32 cumulative sum of row lengths, beginning with 0."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def pack_behind(starts: Sequence[int], counts: Sequence[int]) -> PackedRows:
    """The layout of rows that go on at positions `starts` with `counts` tokens each.

    Only each row's last hidden state is asked for.
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
    """The layout of rows of `lengths` tokens, of which the last `counts` hidden states each are asked for.

    They are the last ones because fewer queries than keys are aligned with the end of a row.
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
    """`given`, or what suits a device where it is None: the tokens of a micro-batch where no backward follows.

    A GPU computes a layer of few rows faster than the host can launch it; on the CPU more rows gain nothing, and what
    is computed of fewer stays in its caches.
    """
    return (32768 if device.type == "cuda" else 4096) if given is None else given


def span_tokens_on(device: torch.device, given: int | None = None) -> int:
    """The same of a micro-batch of spans in training, the layers of which are kept for a backward."""
    return (8192 if device.type == "cuda" else 1024) if given is None else given


def micro_batches(costs: Sequence[int], budget: int) -> Iterator[range]:
    """Cut a sequence into runs whose costs add up to at most `budget`; one that costs more goes alone."""
    start = total = 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > budget:
            yield range(start, i)
            start, total = i, 0
        total += cost
    if start < len(costs):
        yield range(start, len(costs))
