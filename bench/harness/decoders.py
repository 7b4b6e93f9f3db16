"""Shared parts of the decoding benchmarks: providers, prompts, split timings, and the facts of a row."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict
from unittest import mock

import torch

from bench.harness.compare import OURS, Work
from bench.harness.models import SEED, Models
from bench.harness.shapes import Case
from icae_fast.benchmark.checks import assert_greedy
from icae_fast.benchmark.machine import plain_read
from icae_fast.benchmark.measure import speedup
from icae_fast.generation import answers
from icae_fast.generation.decoding import DecodeSession

GENERATE, WEIGHTS_READ = "generate", "weights read"
BY_PROMPT, ONE_BY_ONE = "baseline by prompt", "baseline one by one"
BASELINE, KV_TIER = "baseline", f"{OURS} KV tier"
LLAMA_CPP = "llama.cpp 4-bit"

PROMPT_TOKENS = 16
# The baselines take minutes for all prompts, and the same time for each prompt, so only this many are timed.
MEASURED_PROMPTS = 2


def prompts_for(case: Case) -> list[torch.Tensor]:
    """Return the case's prompts: random ids of base tokens, (PROMPT_TOKENS,) int64 each."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return list(torch.randint(case.shape.vocabulary, (case.prompts, PROMPT_TOKENS), generator=generator))


class AnswerLimits(TypedDict):
    """The arguments of `generate` that bound an answer's length."""

    max_new_tokens: int
    min_new_tokens: int


def answer_limits(case: Case) -> AnswerLimits:
    """Return the arguments that make every answer `case.new_tokens` tokens long."""
    return {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}


def weight_bytes(case: Case) -> int:
    """Return the bytes of the matrices that a step reads, the layers' and the head's; tied embeddings count once."""
    return case.shape.decode_weights() * case.element_size


def decode_work(case: Case) -> Work:
    """Return the work of decoding: one read of the weights per step for all prompts, without keys and values."""
    tokens = case.prompts * case.new_tokens
    return Work("read", bytes=case.new_tokens * weight_bytes(case), tokens=tokens)


def reading_work(case: Case) -> Work:
    """Return the work of `weight_reader`."""
    return dataclasses.replace(decode_work(case), bytes=(case.new_tokens - 1) * weight_bytes(case), tokens=0)


def weight_reader(case: Case) -> Callable[[], None]:
    """Return a call that reads as many bytes as the weights have, once for each step after the first token.

    It reads one contiguous buffer of the weights' size and computes almost nothing (`plain_read`), so no decoder that
    reads its weights at every step should be faster. It takes as long as the steps and is timed next to them: on a
    shared machine the bandwidth changes by the minute, so the best bandwidth of the whole run is no bound for a round.
    """
    call = plain_read(torch.ones(weight_bytes(case) // 4))

    def read() -> None:
        for _ in range(case.new_tokens - 1):
            call()

    return read


class SplitTimer:
    """A call that is timed in two parts, before and after a moment that it reports.

    Args:
        call: returns its result and the moment, by `time.perf_counter`.

    Attributes:
        before, after: seconds of the two parts, call by call.
    """

    def __init__(self, call: Callable[[], tuple[Any, float | None]]) -> None:
        self._call = call
        self.before: list[float] = []
        self.after: list[float] = []

    def __call__(self) -> Any:
        """Make the call, record both times, and return its result."""
        start = time.perf_counter()
        result, moment = self._call()
        end = time.perf_counter()
        assert moment is not None, "the call reported no moment, so its time cannot be split"
        self.before.append(moment - start)
        self.after.append(end - moment)
        return result


def median_and_min(times: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return median and min of times, multiplied by `scale`."""
    return {"median": statistics.median(times) * scale, "min": min(times) * scale}


def step_facts(steps: int, after: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the facts about the tokens after the first.

    Args:
        steps: number of these tokens.
        after: each provider's seconds for all of them, round by round.

    Returns:
        `step_ms`, milliseconds per token of each provider (median and min); `step_speedup_over`, each other provider's
        time over icae_fast's, round by round (median, min, max, of_minima).
    """
    return {
        "step_ms": {name: median_and_min(times, 1e3 / steps) for name, times in after.items()},
        "step_speedup_over": {name: speedup(after[OURS], times) for name, times in after.items() if name != OURS},
    }


def bandwidth_facts(n_bytes: int, steps: int, after: Sequence[float], read: Sequence[float]) -> dict[str, Any]:
    """Return the facts about the bandwidth bound.

    Args:
        n_bytes: bytes that a step reads.
        steps: number of steps, and of plain reads of as many bytes.
        after: seconds of the steps, round by round.
        read: seconds of the plain reads, round by round.

    Returns:
        `weight_bytes`; `step_gbs` and `read_gbs`, 10^9 bytes/s at the median; `fraction_of_read`, the time of the reads
        over that of the steps, round by round (median, min, max, of_minima).
    """
    gbs = {"step_gbs": after, "read_gbs": read}
    return {
        "weight_bytes": n_bytes,
        **{name: n_bytes * steps / statistics.median(times) / 1e9 for name, times in gbs.items()},
        "fraction_of_read": speedup(after, read),
    }


def scaled_times(
    prompts: int, measured: int, by_prompt: Sequence[float], compress: Sequence[float], asking: Sequence[float]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Extrapolate both baselines' times from the measured prompts to all prompts.

    Args:
        prompts: number of prompts.
        measured: number of prompts that were timed.
        by_prompt: seconds of compressing and asking for each timed prompt, round by round.
        compress, asking: seconds of compressing once, and of asking the timed prompts then.

    Returns:
        Each baseline's times, and a description of the extrapolation (empty if all prompts were timed).
    """
    factor = prompts / measured
    times = {
        BY_PROMPT: [t * factor for t in by_prompt],
        ONE_BY_ONE: [c + t * factor for c, t in zip(compress, asking, strict=True)],
    }
    if measured == prompts:
        return times, {}
    asked = f"for {measured} of {prompts} prompts, times {factor:g}"
    return times, {BY_PROMPT: f"measured {asked}", ONE_BY_ONE: f"measured compressing once, and asking {asked}"}


@contextlib.contextmanager
def recorded_kv_bytes() -> Iterator[list[int]]:
    """Record, while open, the bytes of keys and values of every decode session of icae_fast."""
    held: list[int] = []

    def recording(*arguments: Any, **options: Any) -> DecodeSession:
        session = DecodeSession(*arguments, **options)
        held.append(session.nbytes)
        return session

    with mock.patch.object(answers, "DecodeSession", recording):
        yield held


def kv_facts(case: Case, n_bytes: int, own_tokens: int) -> dict[str, Any]:
    """Return the facts about keys and values.

    Args:
        case: its prompts share the memory of one document.
        n_bytes: bytes held by the decode session.
        own_tokens: tokens after the slots in all rows (prompts and answers), which rows cannot share.

    Returns:
        `kv`: `mb` (10^6 bytes) in total, `memory_mb` for one memory's slots, `own_mb` for the rows' own tokens, and
        `memories`, the rest as a multiple of `memory_mb`. It is slightly above 1 (for the prefix) if all rows share one
        memory, and `case.prompts` if every row holds a copy.
    """
    token = case.shape.kv_elements() * case.element_size
    memory, own = len(case.span_lengths) * case.memory_size * token, own_tokens * token
    return {
        "kv": {
            "mb": n_bytes / 1e6, "memory_mb": memory / 1e6, "own_mb": own / 1e6, "memories": (n_bytes - own) / memory,
        }
    }  # fmt: skip


def assert_answers(
    models: Models, case: Case, slots: torch.Tensor, asked: Sequence[torch.Tensor], given: Sequence[list[int]]
) -> None:
    """Assert that every prompt has an answer of the right length that is greedy by the baseline on these slots.

    Args:
        models, case: the models and the workload.
        slots: slots that the answers were generated from.
        asked: ids of the prompts.
        given: ids of the answers.
    """
    assert len(given) == len(asked), f"there are {len(given)} answers to {len(asked)} prompts"
    forbidden = models.icae.eos_token_ids
    for prompt, answer in zip(asked, given, strict=True):
        assert len(answer) == case.new_tokens, f"an answer has {len(answer)} tokens instead of {case.new_tokens}"
        prefix, suffix = models.icae.prompt_ids(prompt)
        assert_greedy(models.baseline, slots, prefix, suffix, answer, forbidden, case.torch_dtype)
