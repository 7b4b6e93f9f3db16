"""Growth of time and memory with the number of spans."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from icae_fast.benchmark.machine import Bounds


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the slope of log time over log size: 1 if time is proportional to size."""
    return float(numpy.polyfit([math.log(n) for n in sizes], [math.log(s) for s in seconds], 1)[0])


@dataclass(frozen=True)
class Growth:
    """The result of a growth benchmark.

    Args:
        name: name of the benchmark.
        facts: workload.
        seconds: times for each number of spans, round by round.
        peaks: peak memory in bytes for each number of spans.
        slots: bytes of the returned slots, which are not working memory.
        backends: op name to the backend that ran it.
    """

    name: str
    facts: dict[str, Any]
    seconds: Mapping[int, list[float]]
    peaks: Mapping[int, int]
    slots: Mapping[int, int]
    backends: dict[str, str]

    def row(self, bounds: Bounds) -> dict[str, Any]:
        """Return the outcome as JSON values.

        Returns:
            `name`, the facts, `rounds`, `exponent` (fitted to the best times), `points` (for each number of `spans`:
            `seconds`, median and min, `peak_mb` above the weights, `slots_mb` included in it, and `working_mb`, the
            rest), `backends`.
        """
        points = [
            {
                "spans": n,
                "seconds": {"median": statistics.median(times), "min": min(times)},
                "peak_mb": self.peaks[n] / 1e6,
                "slots_mb": self.slots[n] / 1e6,
                "working_mb": (self.peaks[n] - self.slots[n]) / 1e6,
            }
            for n, times in self.seconds.items()
        ]
        return {
            "name": self.name,
            **self.facts,
            "rounds": len(next(iter(self.seconds.values()))),
            "exponent": exponent(list(self.seconds), [min(times) for times in self.seconds.values()]),
            "points": points,
            "backends": self.backends,
        }
