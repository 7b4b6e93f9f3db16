"""Spans, memory positions and packing, compared with a direct form of the reference's rules over many sizes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icae_fast import ICAEConfig
from icae_fast.backbone.rows import cumulative, micro_batches
from icae_fast.core.spans import count_spans, memory_positions, pack_spans, span_lengths

SIZES = st.builds(
    ICAEConfig,
    memory_size=st.integers(1, 130),
    compression_rate=st.integers(1, 9),
    memory_positions=st.sampled_from(["append", "spread"]),
)


def reference_segments(length, config):
    """Return the span lengths of the reference's `_compress`: slices of ceil(total / num_segments) tokens."""
    n = math.ceil(length / (config.memory_size * config.compression_rate))
    step = math.ceil(length / n)
    pieces = [range(length)[i * step : (i + 1) * step] for i in range(n)]
    return [len(p) for p in pieces if len(p)]


@given(st.integers(1, 5000), SIZES)
def test_span_lengths_follow_the_references_rule(length, config):
    lengths = span_lengths(length, config)
    assert lengths == reference_segments(length, config)
    assert sum(lengths) == length
    assert min(lengths) >= 1
    assert max(lengths) <= config.max_span_tokens == config.memory_size * config.compression_rate
    assert len(set(lengths[:-1])) <= 1
    assert lengths[-1] <= lengths[0]


@given(st.integers(1, 5000), SIZES)
def test_the_number_of_spans_follows_the_references_rule(length, config):
    n = math.ceil(length / config.max_span_tokens)
    assert len(span_lengths(length, config)) == count_spans(length, config) == n


def test_span_lengths_of_a_few_contexts():
    config = ICAEConfig(memory_size=4, compression_rate=4)
    assert span_lengths(0, config) == []
    assert span_lengths(1, config) == [1]
    assert span_lengths(16, config) == [16]
    assert span_lengths(17, config) == [9, 8]
    assert span_lengths(50, config) == [13, 13, 13, 11]
    assert span_lengths(5, ICAEConfig(memory_size=1, compression_rate=1)) == [1] * 5


@given(st.integers(1, 600), SIZES)
def test_memory_positions_follow_their_formula(length, config):
    k = config.memory_size
    if config.memory_positions == "append":
        expected = [length + i for i in range(k)]
    else:
        expected = [max(0, math.floor((i + 1) * length / k + 1e-9) - 1) for i in range(k)]
        assert expected[-1] == length - 1
        assert expected == sorted(expected)
    assert memory_positions(length, config).tolist() == expected
    assert memory_positions(length, config).dtype == torch.int64


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_micro_batches_keep_order_and_budget(costs, budget):
    batches = list(micro_batches(costs, budget))
    assert [i for batch in batches for i in batch] == list(range(len(costs)))
    sums = [sum(costs[i] for i in batch) for batch in batches]
    assert all(total <= budget or len(batch) == 1 for total, batch in zip(sums, batches, strict=True))
    # Packing is greedy: the first item of the next batch would have exceeded the budget.
    assert all(total + costs[following[0]] > budget for total, following in zip(sums, batches[1:], strict=False))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), SIZES)
def test_layout_of_packed_spans(lengths, config):
    k, rows = config.memory_size, pack_spans(lengths, config)
    positions, cu, wanted, start = [], [0], [], 0
    for n in lengths:
        positions += [*range(n), *memory_positions(n, config).tolist()]
        wanted += range(start + n, start + n + k)
        start += n + k
        cu.append(start)
    assert rows.positions.tolist() == positions
    assert rows.cu_seqlens.tolist() == cu
    assert rows.out_rows.tolist() == wanted
    assert rows.cu_seqlens_out.tolist() == [k * i for i in range(len(lengths) + 1)]
    assert (rows.max_seqlen, rows.max_seqlen_out) == (max(lengths) + k, k)
    assert (rows.cu_seqlens.dtype, rows.cu_seqlens_out.dtype) == (torch.int32, torch.int32)
    assert (rows.positions.dtype, rows.out_rows.dtype) == (torch.int64, torch.int64)


def test_packed_rows_move_between_devices():
    rows = pack_spans([3, 2], ICAEConfig(memory_size=2)).to(torch.device("meta"))
    assert all(t.device.type == "meta" for t in vars(rows).values() if isinstance(t, torch.Tensor))
    assert rows.max_seqlen == 5


@pytest.mark.parametrize(("lengths", "expected"), [([], [0]), ([3], [0, 3]), ([2, 5, 1], [0, 2, 7, 8])])
def test_cumulative_starts_at_0_and_ends_at_the_sum(lengths, expected):
    assert cumulative(lengths).tolist() == expected
