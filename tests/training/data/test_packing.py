"""Packing into steps and micro-batches: each sample once, within budgets, at about equal cost, for any world size."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icae_fast.training.data.packing import count_fitting, count_micro_batches, pack_steps, share_of_process

COSTS = st.lists(st.integers(1, 120), min_size=1, max_size=60)


@st.composite
def packings(draw):
    """Draw (costs that fit, steps, micro-batches per step, budget)."""
    n_steps, per_step = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 4, 8]))
    budget = draw(st.integers(1, 200))
    n = n_steps * per_step
    costs = draw(st.lists(st.integers(1, 120), min_size=n, max_size=n + 60))
    return costs[: count_fitting(costs, n, budget)], n_steps, per_step, budget


@given(packings(), st.integers(0, 3))
def test_every_sample_goes_into_one_micro_batch_within_its_budget(packing, seed):
    costs, n_steps, per_step, budget = packing
    steps = pack_steps(costs, n_steps, per_step, budget, random.Random(seed))
    assert [len(step) for step in steps] == [per_step] * n_steps
    batches = [batch for step in steps for batch in step]
    assert sorted(i for batch in batches for i in batch) == list(range(len(costs)))
    for batch in batches:
        assert len(batch) == 1 or 0 < sum(costs[i] for i in batch) <= budget
    assert steps == pack_steps(costs, n_steps, per_step, budget, random.Random(seed))


@given(packings())
def test_processes_share_a_step(packing):
    costs, n_steps, per_step, budget = packing
    for step in pack_steps(costs, n_steps, per_step, budget, random.Random(0)):
        whole = share_of_process(step, costs)
        assert sorted(map(tuple, step)) == sorted(tuple(batch) for _, batch in whole)
        loads = [sum(costs[i] for i in batch) for _, batch in whole]
        assert loads == sorted(loads, reverse=True)
        for world in (w for w in (2, 4, 8) if per_step % w == 0):
            parts = [share_of_process(step, costs, rank, world) for rank in range(world)]
            assert {len(part) for part in parts} == {per_step // world}
            assert sorted(numbered for part in parts for numbered in part) == whole


@given(COSTS, st.integers(1, 60), st.integers(1, 200))
def test_fit_is_the_most_that_sorted_runs_can_hold(costs, n_batches, budget):
    def needed(n):
        batches, room = 0, 0
        for cost in sorted(costs[:n]):
            if cost > room:
                batches, room = batches + 1, budget
            room -= cost
        return batches

    fits = [n for n in range(len(costs) + 1) if needed(n) <= n_batches]
    assert count_fitting(costs, n_batches, budget) == max(fits)
    assert fits == list(range(len(fits)))


@given(st.lists(st.integers(50, 60), min_size=64, max_size=200), st.integers(0, 3))
def test_steps_of_like_samples_cost_about_the_same(costs, seed):
    steps = pack_steps(costs, 4, 4, 10_000, random.Random(seed))
    batches = [sum(costs[i] for i in batch) for step in steps for batch in step]
    # Cuts are between samples, so micro-batches differ by one sample, rarely by two.
    assert max(batches) - min(batches) <= 2 * 60
    totals = [sum(costs[i] for batch in step for i in batch) for step in steps]
    assert max(totals) - min(totals) <= 4 * 60


def test_long_and_short_samples_are_in_every_step():
    costs = [10] * 80 + [40] * 20
    steps = pack_steps(costs, 4, 4, 200, random.Random(0))
    for step in steps:
        assert {len({costs[i] for i in batch}) for batch in step} == {1}
        assert {costs[i] for batch in step for i in batch} == {10, 40}


@pytest.mark.parametrize(
    ("tokens", "budget", "world", "expected"),
    [(8192, 1024, 1, 8), (8193, 1024, 1, 9), (100, 1024, 1, 1), (100, 1024, 4, 4), (5000, 1024, 4, 8), (1, 1, 3, 3)],
)
def test_number_of_micro_batches(tokens, budget, world, expected):
    assert count_micro_batches(tokens, budget, world) == expected


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 samples do not fill 4 micro-batches"):
        pack_steps([1, 1, 1], 2, 2, 10, random.Random(0))
    with pytest.raises(ValueError, match="3 samples do not fill 1 micro-batches of at most 10"):
        pack_steps([6, 6, 6], 1, 1, 10, random.Random(0))
