"""One benchmark: check all providers, time them in interleaved rounds, and report the result."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from icae_fast import backend_of
from icae_fast.benchmark.machine import REPOSITORY, Bounds, machine_slug, synchronize
from icae_fast.benchmark.measure import peak_memory, speedup
from icae_fast.io.files import write_atomically

OURS = "icae_fast"
RESULTS = REPOSITORY / "docs" / "results"
GEMM_BOUND = {torch.bfloat16: "gemm_bf16", torch.float32: "gemm_fp32"}


@dataclass(frozen=True)
class Work:
    """The least work of a call's result, the same for every provider that computes it.

    Args:
        bound: the bound to compare with: "gemm_bf16" or "gemm_fp32" (uses `flops`), or "read" (uses `bytes`).
        flops: multiplications and additions that the result needs at least.
        bytes: bytes that must be read at least.
        tokens: context tokens compressed, rows of a packed batch, or tokens generated.
    """

    bound: str
    flops: int = 0
    bytes: int = 0
    tokens: int = 0

    def rates(self, seconds: float, bounds: Bounds) -> dict[str, float]:
        """Return `tokens_per_s`, `gflops`, `gbs` and `fraction_of_bound` of a call; rates of zero are left out."""
        amount = self.bytes if self.bound == "read" else self.flops
        rates = {
            "tokens_per_s": self.tokens / seconds,
            "gflops": self.flops / seconds / 1e9,
            "gbs": self.bytes / seconds / 1e9,
            "fraction_of_bound": amount / seconds / bounds.rates[self.bound],
        }
        return {name: value for name, value in rates.items() if value}


@dataclass(frozen=True)
class Outcome:
    """The result of a comparison.

    Args:
        name: name of the benchmark.
        facts: workload and mode.
        seconds: each provider's times, round by round.
        peaks: each provider's working memory in bytes.
        work: the work of a call.
        backends: op name to the backend that ran it.
        lesser: the work of those providers that compute only a part of the result.
    """

    name: str
    facts: dict[str, Any]
    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    work: Work
    backends: dict[str, str]
    lesser: Mapping[str, Work] = field(default_factory=dict)

    def row(self, bounds: Bounds) -> dict[str, Any]:
        """Return the outcome as JSON values.

        Returns:
            `name`, the facts, `rounds`, `seconds` (median and min of each provider), `speedup_over` (each other
            provider's time over icae_fast's, round by round: median, min, max, and `of_minima`, the ratio of the best
            times), `rates` (at the median), `bound`, `peak_bytes`, `backends`.
        """
        medians = {name: statistics.median(times) for name, times in self.seconds.items()}
        ours = self.seconds[OURS]
        return {
            "name": self.name,
            **self.facts,
            "rounds": len(ours),
            "seconds": {n: {"median": medians[n], "min": min(t)} for n, t in self.seconds.items()},
            "speedup_over": {n: speedup(ours, t) for n, t in self.seconds.items() if n != OURS},
            "rates": {n: self.lesser.get(n, self.work).rates(t, bounds) for n, t in medians.items()},
            "bound": self.work.bound,
            "peak_bytes": self.peaks,
            "backends": self.backends,
        }


class Compare:
    """A comparison of providers through pytest-benchmark's `benchmark`, whose statistics are those of `icae_fast`.

    Each round of `benchmark.pedantic` is a timed call of `icae_fast`. Its untimed `setup` times one call of every other
    provider just before, so the rounds interleave in one process. With `--benchmark-disable` every provider runs once
    and is checked.

    Args:
        benchmark: the fixture.
        bounds: bounds of this run.
        machine: result of `describe_machine`.
        min_rounds, max_time: run the rounds that fit into `max_time` seconds, and at least `min_rounds`.
        device: device to synchronise with and to measure memory of.

    Attributes:
        outcome: the result after the run, any object with an `Outcome`'s `row`.
    """

    def __init__(
        self,
        benchmark: Any,
        bounds: Bounds,
        machine: dict[str, Any],
        min_rounds: int = 5,
        max_time: float = 1.0,
        device: str = "cpu",
    ) -> None:
        self.benchmark, self.bounds, self.machine = benchmark, bounds, machine
        self.min_rounds, self.max_time, self.device = min_rounds, max_time, device
        self.outcome: Any = None

    def __call__(
        self,
        calls: Mapping[str, Callable[[], Any]],
        check: Callable[[dict[str, Any]], None],
        work: Work,
        ops: Sequence[str] = (),
        lesser: Mapping[str, Work] | None = None,
        rounds: int | None = None,
        derive: Callable[[Mapping[str, list[float]]], dict[str, Any]] | None = None,
        **facts: Any,
    ) -> None:
        """Run the comparison and report its outcome.

        Args:
            calls: provider name to a call without arguments; "icae_fast" must be present.
            check: called with the results by provider name; raises unless they are the same.
            work: the work of one call.
            ops: names of this package's ops that run.
            lesser: the work of those providers that compute only a part of the result.
            rounds: see `measure`.
            derive: returns further facts from each provider's times, round by round.
            facts: further values of the row (workload, mode).
        """
        seconds, peaks = self.measure(calls, check, rounds=rounds)
        backends = {op: backend_of(op, self.device) for op in ops}
        derived = derive(seconds) if derive else {}
        self.report(Outcome(self.benchmark.name, {**facts, **derived}, seconds, peaks, work, backends, lesser or {}))

    def measure(
        self,
        calls: Mapping[str, Callable[[], Any]],
        check: Callable[[dict[str, Any]], None],
        target: str = OURS,
        rounds: int | None = None,
    ) -> tuple[dict[str, list[float]], dict[str, int]]:
        """Check the results, measure peak memory, and time in interleaved rounds.

        Args:
            calls, check: see `__call__`.
            target: the call whose times are reported to pytest-benchmark.
            rounds: None for short calls. For calls of many seconds, the number of rounds (at most `min_rounds`); the
                checked calls also measure the peak and are the only warm-up. 1 for calls of minutes: a single call of
                each is checked, measured and timed, page faults included.

        Returns:
            Each call's times, round by round, and its working memory in bytes.
        """
        peaks: dict[str, int] = {}
        measured = {name: self._measuring_peak(name, call, peaks) for name, call in calls.items()}
        if not self.benchmark.enabled or rounds == 1:
            seconds, results = self._time(measured, target, rounds=1, warmup=0)
            check(results)
        elif rounds is not None:
            check({name: call() for name, call in measured.items()})
            self.bounds.probe()
            seconds, _ = self._time(calls, target, min(rounds, self.min_rounds), warmup=0)
        else:
            check({name: call() for name, call in calls.items()})
            start = time.perf_counter()
            for call in measured.values():
                call()
            enough = max(self.min_rounds, math.ceil(self.max_time / (time.perf_counter() - start)))
            self.bounds.probe()
            # One warm-up round, because measuring the peak has returned freed pages to the system.
            seconds, _ = self._time(calls, target, enough, warmup=1)
        self.bounds.probe()
        return seconds, peaks

    def report(self, outcome: Any) -> None:
        """Keep an outcome and put its row into `benchmark.extra_info`."""
        self.outcome = outcome
        machine = {k: self.machine[k] for k in ("device", "cpu", "isa", "threads", "versions", "commit", "dirty")}
        self.benchmark.extra_info.update(outcome.row(self.bounds), **machine, bounds=self.bounds.as_dict())

    def _measuring_peak(self, name: str, call: Callable[[], Any], peaks: dict[str, int]) -> Callable[[], Any]:
        def run() -> Any:
            result, peaks[name] = peak_memory(call, self.device)
            return result

        return run

    def _time(
        self, calls: Mapping[str, Callable[[], Any]], target: str, rounds: int, warmup: int
    ) -> tuple[dict[str, list[float]], dict[str, Any]]:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        results: dict[str, Any] = {}

        def timed(name: str) -> None:
            synchronize(self.device)
            start = time.perf_counter()
            results[name] = calls[name]()
            synchronize(self.device)
            seconds[name].append(time.perf_counter() - start)

        def others() -> None:
            for name in calls:
                if name != target:
                    timed(name)

        self.benchmark.pedantic(timed, args=(target,), setup=others, rounds=rounds, warmup_rounds=warmup)
        return {name: times[warmup:] for name, times in seconds.items()}, results


def results_path(suite: str, machine: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Return the path of a suite's results on this kind of machine, `SUITE-MACHINE.json`.

    Args:
        suite: name of the suite.
        machine: result of `describe_machine`.
        folder: where results are kept.
    """
    return folder / f"{suite}-{machine_slug(machine)}.json"


def write_json(path: Path, content: Any) -> None:
    """Write JSON values to a file, or leave the file as it was if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: (json.dumps(content, indent=1) + "\n").encode()})


def write_results(
    suite: str, machine: dict[str, Any], rows: Sequence[dict[str, Any]], folder: Path = RESULTS, **facts: Any
) -> Path:
    """Write a suite's results, replacing those of an earlier run on this kind of machine.

    Args:
        suite, machine, folder: see `results_path`.
        rows: JSON values, rounded.
        facts: further values of the file.

    Returns:
        The file's path.
    """
    path = results_path(suite, machine, folder)
    write_json(path, {"suite": suite, "machine": machine, **facts, "rows": rows})
    return path
