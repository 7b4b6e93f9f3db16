"""Interleaved timing, ratios round by round, and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

Result = TypeVar("Result")

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def interleave(calls: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Call each function once per round, so that all of them see the same good and bad minutes of a shared machine.

    Args:
        calls: functions by name.
        rounds: number of rounds.

    Returns:
        For each name its results, one per round.
    """
    results: dict[str, list[Result]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            results[name].append(call())
    return results


def pair_ratios(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return median, min and max of `reference / times`, round by round."""
    ratios = [r / t for t, r in zip(times, reference, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def speedup(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return `pair_ratios` and `of_minima`, the ratio of the best times, which other load disturbs least."""
    return {**pair_ratios(times, reference), "of_minima": min(reference) / min(times)}


def peak_memory(call: Callable[[], Result], device: torch.device | str = "cpu") -> tuple[Result, int]:
    """Return a call's result and by how many bytes memory rose above the level before it.

    The weights are allocated before, so this is the working memory above the weights. On a GPU the figure is torch's
    allocator's. On a CPU it is the process's resident memory. Freed pages are first returned to the system, because a
    call that reuses them would seem to need none; the kernel tracks the peak where it can be read (Linux), otherwise a
    thread samples it. Returned pages must be faulted in again, so do not time the call.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR_REFS.write_text("5")  # resets the high-water mark to the current resident size
    except OSError:
        return _sampled_peak(call)
    before = _resident("VmHWM")
    result = call()
    return result, max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    line = next(s for s in _STATUS.read_text().splitlines() if s.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _sampled_peak(call: Callable[[], Result], interval: float = 0.001) -> tuple[Result, int]:
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(interval):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        result = call()
        peak = max(peak, process.memory_info().rss)
    finally:
        done.set()
        thread.join()
    return result, peak - before


class FirstToken:
    """A transformers streamer that records when the first new token arrived.

    Args:
        skip: calls of `put` to ignore first; transformers' `generate` puts the prompt.

    Attributes:
        at: `time.perf_counter()` of the first new token, None before it.
    """

    def __init__(self, skip: int = 0) -> None:
        self._skip = skip
        self.at: float | None = None

    def put(self, value: Any) -> None:
        """Record the time of the first token that is not skipped."""
        if self._skip:
            self._skip -= 1
        elif self.at is None:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Do nothing; part of the streamer interface."""


def rounded(value: Any, digits: int = 4) -> Any:
    """Return JSON values with floats rounded to `digits` significant digits; more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, (list, tuple)) else value
