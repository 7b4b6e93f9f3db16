"""Timing in interleaved rounds, ratios of pairs, and peak memory."""

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
    """Call each once a round, round after round: on a shared machine all of them see the same good and bad minutes.

    Returns:
        For each name its results, one a round.
    """
    results: dict[str, list[Result]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            results[name].append(call())
    return results


def pair_ratios(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """How many times faster `times` is than `reference`: of the ratios round by round, median, min and max."""
    ratios = [r / t for t, r in zip(times, reference, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def speedup(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """`pair_ratios`, and `of_minima`: the ratio of the best times, which other people's work disturbs least."""
    return {**pair_ratios(times, reference), "of_minima": min(reference) / min(times)}


def peak_memory(call: Callable[[], Result], device: torch.device | str = "cpu") -> tuple[Result, int]:
    """The result of a call, and by how many bytes memory rose above what was held before it.

    The weights are held before, so this is the working memory over the weights. On a GPU it is torch's
    allocator that is asked. On a CPU it is the process's resident memory: freed pages are first given back to
    the system, since a call that reuses them would seem to need none; the kernel keeps the peak where it
    lets itself be asked (Linux), else a thread samples it. Pages given back must be faulted in again, so
    the call is not to be timed.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR_REFS.write_text("5")  # sets the high-water mark to what is resident now
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

    def sample():
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
    """A transformers streamer that notes when the first new token came.

    Args:
        skip: puts to pass over first; `generate` of transformers puts the prompt.

    Attributes:
        at: `time.perf_counter()` of the first new token, None before it.
    """

    def __init__(self, skip: int = 0) -> None:
        self._skip, self.at = skip, None

    def put(self, value: Any) -> None:
        """Called with every token."""
        if self._skip:
            self._skip -= 1
        elif self.at is None:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Called at the end."""


def rounded(value: Any, digits: int = 4) -> Any:
    """JSON values with floats cut to some significant digits; more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, (list, tuple)) else value
