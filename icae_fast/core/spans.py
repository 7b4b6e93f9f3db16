"""Cutting contexts into spans, placing their memory tokens, and packing spans into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icae_fast.backbone.rows import PackedRows, cumulative
from icae_fast.config import ICAEConfig
from icae_fast.errors import InvalidInputError


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


@dataclass(frozen=True)
class CutContext:
    """A checked context and its cut into spans.

    Args:
        ids: (L,) int64 ids of base tokens, L at least 1.
        span_lengths: tokens of each span, in order; they add up to L.
    """

    ids: torch.Tensor
    span_lengths: tuple[int, ...]

    @classmethod
    def of(cls, ids: torch.Tensor, config: ICAEConfig) -> CutContext:
        """Cut ids by the reference's rule; see `span_lengths`."""
        return cls(ids, tuple(span_lengths(len(ids), config)))

    def spans(self) -> tuple[torch.Tensor, ...]:
        """Return the ids of each span, as views."""
        return self.ids.split(list(self.span_lengths))


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
