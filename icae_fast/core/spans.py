"""Spans: cut contexts, place memory tokens, and pack spans into rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icae_fast.backbone.rows import PackedRows, cumulative
from icae_fast.checks import is_int
from icae_fast.config import ICAEConfig
from icae_fast.errors import InvalidInputError


def count_spans(length: int, config: ICAEConfig) -> int:
    """Return the number of spans of a context of `length` tokens: `ceil(L / (k * rate))`.

    Source: `compute_num_segments` in getao/icae `code/icae_v2/modeling_icae_multi_span.py`.
    """
    return -(-length // config.max_span_tokens)


def span_lengths(length: int, config: ICAEConfig) -> list[int]:
    """Return the span lengths of a context of `length` tokens, by the reference's rule.

    `n = ceil(L / (k * rate))` spans of `ceil(L / n)` tokens each, the last one shorter; none is empty.
    """
    if length == 0:
        return []
    n = count_spans(length, config)
    step = -(-length // n)
    return [min(step, length - start) for start in range(0, length, step)]


@dataclass(frozen=True, eq=False)
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
    """Return the number of memory tokens behind a span: `memory_size`, or k if it is None.

    Raises:
        InvalidInputError: `memory_size` is not a whole number from 1 to k.
    """
    k = config.memory_size
    if memory_size is None:
        return k
    if not is_int(memory_size) or not 1 <= memory_size <= k:
        raise InvalidInputError(f"memory_size is {memory_size!r}; it must be a whole number from 1 to {k}, or None")
    return int(memory_size)


def memory_positions(length: int, config: ICAEConfig, memory_size: int | None = None) -> torch.Tensor:
    """Return the position ids of the k memory tokens behind a span of `length` tokens, (k,) int64.

    `append`: L, L + 1, ...; `spread`: `max(0, floor((i + 1) * L / k) - 1)` for memory token i. If `memory_size` is
    given, it replaces k.
    """
    k = slots_per_span(config, memory_size)
    if config.memory_positions == "append":
        return torch.arange(length, length + k)
    return ((torch.arange(1, k + 1) * length) // k - 1).clamp_min(0)


def pack_spans(
    lengths: Sequence[int], config: ICAEConfig, memory_size: int | None = None, n_leading: int = 0
) -> PackedRows:
    """Lay out a batch of spans, each directly followed by its k (or `memory_size`) memory tokens.

    `out_rows` holds memory tokens only, so that the last layer computes nothing but keys and values for the context.
    There is no padding. `n_leading` tokens stand before each span and shift its positions.
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
