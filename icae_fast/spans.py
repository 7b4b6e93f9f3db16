"""Cutting contexts into spans, placing their memory tokens, and packing spans into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from icae_fast.config import ICAEConfig
from icae_fast.errors import InvalidInputError
from icae_fast.ops._lengths import remember


def count_spans(length: int, config: ICAEConfig) -> int:
    """Number of spans that a context of `length` tokens is cut into: `ceil(L / (k * rate))`.

    Source: `compute_num_segments` in getao/icae `code/icae_v2/modeling_icae_multi_span.py`.
    """
    return -(-length // config.max_span_tokens)


def span_lengths(length: int, config: ICAEConfig) -> list[int]:
    """Lengths of the spans of a context of `length` tokens, by the reference's rule.

    `n = ceil(L / (k * rate))` spans of `ceil(L / n)` tokens each, the last one shorter; none is empty.
    """
    if length == 0:
        return []
    n = count_spans(length, config)
    step = -(-length // n)
    return [min(step, length - start) for start in range(0, length, step)]


def cut_contexts(contexts: Sequence[torch.Tensor], config: ICAEConfig) -> tuple[list[torch.Tensor], list[int]]:
    """The spans of all contexts one after another, and how many each context has."""
    cuts = [span_lengths(len(ids), config) for ids in contexts]
    spans = [span for ids, cut in zip(contexts, cuts, strict=True) for span in ids.split(cut)]
    return spans, [len(cut) for cut in cuts]


def slots_per_span(config: ICAEConfig, memory_size: int | None = None) -> int:
    """`memory_size`, the number of memory tokens behind a span, or k where it is None.

    Raises:
        InvalidInputError: not a whole number from 1 to k.
    """
    k = config.memory_size
    if memory_size is None:
        return k
    if isinstance(memory_size, bool) or not isinstance(memory_size, int) or not 1 <= memory_size <= k:
        raise InvalidInputError(f"memory_size is {memory_size!r}; it must be a whole number from 1 to {k}, or None")
    return memory_size


def memory_positions(length: int, config: ICAEConfig, memory_size: int | None = None) -> torch.Tensor:
    """Position ids of the k memory tokens behind a span of `length` tokens, (k,) int64.

    `append`: L, L + 1, ...; `spread`: `max(0, floor((i + 1) * L / k) - 1)` for memory token i. With a `memory_size`
    k' there are so many memory tokens, and k' stands for k.
    """
    k = slots_per_span(config, memory_size)
    if config.memory_positions == "append":
        return torch.arange(length, length + k)
    return ((torch.arange(1, k + 1) * length) // k - 1).clamp_min(0)


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


def pack_spans(
    lengths: Sequence[int], config: ICAEConfig, memory_size: int | None = None, n_leading: int = 0
) -> PackedRows:
    """The layout of a batch of spans, each followed at once by its k (or `memory_size`) memory tokens.

    Only memory tokens are in `out_rows`, so that the last layer computes nothing for the context but its
    keys and values. There is no padding. Before each span stand `n_leading` tokens, which move its positions on.
    """
    k = slots_per_span(config, memory_size)
    cu = cumulative([n_leading + n + k for n in lengths])
    positions = [p for n in lengths for p in (torch.arange(n_leading + n), n_leading + memory_positions(n, config, k))]
    ends = cu[1:].to(torch.int64)
    return PackedRows(
        positions=torch.cat(positions),
        cu_seqlens=cu,
        max_seqlen=n_leading + max(lengths) + k,
        out_rows=(ends[:, None] + torch.arange(-k, 0)).flatten(),
        cu_seqlens_out=torch.arange(len(lengths) + 1, dtype=torch.int32) * k,
        max_seqlen_out=k,
    )


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
