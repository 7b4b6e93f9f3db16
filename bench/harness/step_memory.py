"""Memory of a training step as a function of context length, extrapolated where the step does not fit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import psutil

from icae_fast import ICAE
from icae_fast.benchmark.machine import Bounds
from icae_fast.benchmark.measure import peak_memory

# Limits of a step that is run; a step expected to take longer, or a larger share of free memory, is extrapolated.
MAX_SECONDS, MEMORY_SHARE = 120.0, 0.8


@dataclass(frozen=True)
class Point:
    """A step at one context length.

    Args:
        tokens: context tokens.
        peak: bytes of working memory.
        seconds: time of the step, None if it was not run.
    """

    tokens: int
    peak: int
    seconds: float | None = None

    @property
    def extrapolated(self) -> bool:
        """Whether the step was not run."""
        return self.seconds is None


@dataclass(frozen=True)
class Line:
    """A straight line fitted to peaks.

    Args:
        slope: bytes per token.
        intercept: bytes.
        error: largest deviation of a fitted peak, as a fraction of it.
    """

    slope: float
    intercept: float
    error: float

    @classmethod
    def through(cls, points: Sequence[Point]) -> Line:
        """Fit a line to the upper half of the points, at least two."""
        upper = points[min(len(points) // 2, len(points) - 2) :]
        tokens, peaks = [p.tokens for p in upper], [p.peak for p in upper]
        slope, intercept = (float(v) for v in numpy.polyfit(tokens, peaks, 1))
        error = max(abs(slope * t + intercept - p) / max(p, 1) for t, p in zip(tokens, peaks, strict=True))
        return cls(slope, intercept, error)

    def at(self, tokens: int) -> int:
        """Return the line's value at `tokens`, in bytes."""
        return round(self.slope * tokens + self.intercept)


def measure_affordable(
    calls: Mapping[int, Callable[[], Any]],
    free: Callable[[], float] | None = None,
    max_seconds: float | None = None,
) -> tuple[list[Point], dict[str, Any] | None]:
    """Run steps of growing length until the fitted line predicts too much time or memory for the next one.

    Args:
        calls: context tokens to a step, ascending; the first two always run.
        free: returns the free bytes, by default those of the machine.
        max_seconds: limit for a step, by default `MAX_SECONDS`.

    Returns:
        Points of all lengths, extrapolated after the stop; and where and why it stopped, None if all steps ran.
    """
    free = free or (lambda: psutil.virtual_memory().available)
    max_seconds = MAX_SECONDS if max_seconds is None else max_seconds
    points: list[Point] = []
    stopped: dict[str, Any] | None = None
    for tokens, call in calls.items():
        if len(points) >= 2 and stopped is None:
            expected, last = Line.through(points).at(tokens), points[-1]
            assert last.seconds is not None  # extrapolated points are only added after the loop
            seconds, room = last.seconds * tokens / last.tokens, MEMORY_SHARE * free()
            if expected > room or seconds > max_seconds:
                stopped = {
                    "tokens": tokens, "expected_bytes": expected, "allowed_bytes": int(room),
                    "expected_seconds": seconds, "allowed_seconds": max_seconds,
                }  # fmt: skip
                break
        start = time.perf_counter()
        _, peak = peak_memory(call)
        points.append(Point(tokens, peak, time.perf_counter() - start))
    rest = [n for n in calls if n > points[-1].tokens]
    if rest:
        line = Line.through(points)
        points += [Point(n, line.at(n)) for n in rest]
    return points, stopped


@contextlib.contextmanager
def positions_up_to(icae: ICAE, positions: int) -> Iterator[None]:
    """Raise the decoder's limit of positions to at least `positions`."""
    before = icae.max_positions
    icae.max_positions = max(before, positions)
    try:
        yield
    finally:
        icae.max_positions = before


@dataclass(frozen=True)
class StepMemory:
    """The result of a memory benchmark.

    Args:
        name: name of the benchmark.
        facts: workload.
        points: points of each provider, ascending.
        positions: decoder positions by context tokens.
        stopped: where and why the baseline stopped, from `measure_affordable`.
        backends: op name to the backend that ran it.
    """

    name: str
    facts: dict[str, Any]
    points: Mapping[str, Sequence[Point]]
    positions: Mapping[int, int]
    stopped: dict[str, Any] | None
    backends: dict[str, str]

    def row(self, bounds: Bounds) -> dict[str, Any]:
        """Return the outcome as JSON values.

        Returns:
            `name`, the facts, `memory` (for each provider: `bytes_per_token`, the slope over the upper half of the
            measured lengths, its `fit_error`, and `points` with context `tokens`, decoder `positions`, `peak_mb` above
            the weights, `seconds`, `extrapolated`), `baseline_stopped`, `backends`.
        """
        memory = {}
        for name, points in self.points.items():
            line = Line.through([p for p in points if not p.extrapolated])
            memory[name] = {
                "bytes_per_token": line.slope,
                "fit_error": line.error,
                "points": [
                    {
                        "tokens": p.tokens, "positions": self.positions[p.tokens], "peak_mb": p.peak / 1e6,
                        "seconds": p.seconds, "extrapolated": p.extrapolated,
                    }
                    for p in points
                ],
            }  # fmt: skip
        return {
            "name": self.name, **self.facts, "memory": memory, "baseline_stopped": self.stopped,
            "backends": self.backends,
        }  # fmt: skip
