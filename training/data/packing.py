"""The samples of each optimiser step, and of each forward.

Samples of several steps are sorted by cost and cut into micro-batches of about equal cost, so that the rows of a
micro-batch have similar lengths. Each step then gets one micro-batch of every size class, so that steps are similar
too. The result is a function of the costs, the budgets and a random generator.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

Step = list[list[int]]  # micro-batches of indices of samples


def count_micro_batches(tokens_per_step: int, micro_batch_tokens: int, world_size: int = 1) -> int:
    """Return the micro-batches of an optimiser step over all processes: `ceil(tokens_per_step / micro_batch_tokens)`.

    The number is rounded up to a multiple of the number of processes.
    """
    needed = -(-tokens_per_step // micro_batch_tokens)
    return -(-needed // world_size) * world_size


def count_fitting(costs: Sequence[int], n_batches: int, budget: int) -> int:
    """Return how many of the first samples fit into `n_batches` micro-batches.

    A micro-batch holds samples of at most `budget` tokens, or a single larger sample. With at least `n_batches` samples
    the result is at least `n_batches`.
    """
    low, high = min(n_batches, len(costs)), len(costs)
    # The number of micro-batches does not decrease with the number of samples.
    return bisect_right(range(low + 1, high + 1), n_batches, key=lambda n: _Runs(sorted(costs[:n])).count(budget)) + low


def pack_steps(costs: Sequence[int], n_steps: int, per_step: int, budget: int, rng: random.Random) -> list[Step]:
    """Distribute samples over steps and micro-batches.

    Args:
        costs: tokens of each sample; `count_fitting(costs, n_steps * per_step, budget)` must be all of them.
        n_steps: optimiser steps.
        per_step: micro-batches of a step.
        budget: tokens of a micro-batch; a larger sample has a micro-batch to itself.
        rng: shuffles micro-batches of about the same cost over the steps.

    Returns:
        Steps, each a list of micro-batches of indices into `costs`. Each index occurs once, and no micro-batch is
        empty.

    Raises:
        ValueError: there are more samples than fit, or fewer than micro-batches.
    """
    n_batches = n_steps * per_step
    order = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    runs = _Runs([costs[i] for i in order]).split(n_batches, budget)
    steps: list[Step] = [[] for _ in range(n_steps)]
    for first in range(0, n_batches, n_steps):
        alike = runs[first : first + n_steps]
        rng.shuffle(alike)
        for step, run in zip(steps, alike, strict=True):
            step.append([order[i] for i in run])
    return steps


def share_of_process(
    step: Step, costs: Sequence[int], rank: int = 0, world_size: int = 1
) -> list[tuple[int, list[int]]]:
    """Return one process's micro-batches of a step: as many as every other process, of about the same cost.

    Args:
        step: step from `pack_steps`, with a multiple of `world_size` micro-batches.
        costs: tokens of each sample.
        rank: rank of the process.
        world_size: number of processes.

    Returns:
        (place, samples) of each micro-batch, the place being its rank by cost in the step. The largest comes first, so
        that a lack of memory shows at once.
    """
    ranked = sorted(range(len(step)), key=lambda j: (-sum(costs[i] for i in step[j]), j))

    def receiver(place: int) -> int:
        # Back and forth, so that no process gets the most costly micro-batch of every round.
        turn, seat = divmod(place, world_size)
        return seat if turn % 2 == 0 else world_size - 1 - seat

    return [(place, step[j]) for place, j in enumerate(ranked) if receiver(place) == rank]


class _Runs:
    """Runs of consecutive samples with a total cost of at most a cap; a sample above the cap is a run by itself."""

    def __init__(self, costs: Sequence[int]) -> None:
        self.n = len(costs)
        self.sums = [0, *accumulate(costs)]

    def end(self, start: int, cap: int) -> int:
        """Return the end of the longest run from `start`."""
        return max(bisect_right(self.sums, self.sums[start] + cap) - 1, start + 1)

    def count(self, cap: int) -> int:
        """Return the least number of runs, found by taking the longest run each time."""
        start = runs = 0
        while start < self.n:
            start, runs = self.end(start, cap), runs + 1
        return runs

    def split(self, n_runs: int, budget: int) -> list[range]:
        """Return exactly `n_runs` non-empty runs with the least possible maximum cost, otherwise about equal.

        Raises:
            ValueError: the budget does not allow it.
        """
        if not self.n >= n_runs >= self.count(budget):
            raise ValueError(f"{self.n} samples do not fill {n_runs} micro-batches of at most {budget} tokens")
        cap = bisect_left(range(budget), True, key=lambda c: self.count(c) <= n_runs)
        needed = [0] * (self.n + 1)  # runs of the samples from index i on
        for i in reversed(range(self.n)):
            needed[i] = 1 + needed[self.end(i, cap)]
        runs, start = [], 0
        for left in reversed(range(n_runs)):
            equal = self.sums[start] + (self.sums[-1] - self.sums[start]) // (left + 1)
            soonest = bisect_left(needed, -left, lo=start + 1, key=lambda n: -n)
            latest = min(self.end(start, cap), self.n - left)
            nearest = bisect_left(self.sums, equal, lo=start + 1)
            if nearest > start + 1 and equal - self.sums[nearest - 1] < self.sums[nearest] - equal:
                nearest -= 1
            stop = min(max(nearest, soonest), latest)
            runs.append(range(start, stop))
            start = stop
        return runs
