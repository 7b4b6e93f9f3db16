"""What the benchmarks of answering share: providers' names, prompts, parts of calls, and what is said beside times."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
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
# The baselines take minutes for all prompts, each of which costs them the same; they are timed for so many.
MEASURED_PROMPTS = 2


def prompts_for(case: Case) -> list[torch.Tensor]:
    """The case's prompts: random ids of base tokens, (PROMPT_TOKENS,) int64 each."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return list(torch.randint(case.shape.vocabulary, (case.prompts, PROMPT_TOKENS), generator=generator))


def answer_limits(case: Case) -> dict[str, int]:
    """Arguments by which every answer has `case.new_tokens` tokens, whichever they are."""
    return {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}


def weight_bytes(case: Case) -> int:
    """Bytes of the matrices that a step reads, the layers' and the head's; embeddings tied to the head count once."""
    return case.shape.decode_weights() * case.element_size


def decode_work(case: Case) -> Work:
    """The least that a step for all prompts reads, `case.new_tokens` times; keys and values come on top."""
    tokens = case.prompts * case.new_tokens
    return Work("read", bytes=case.new_tokens * weight_bytes(case), tokens=tokens)


def reading_work(case: Case) -> Work:
    """What `weight_reader` reads."""
    return dataclasses.replace(decode_work(case), bytes=(case.new_tokens - 1) * weight_bytes(case), tokens=0)


def weight_reader(case: Case) -> Callable[[], None]:
    """A call that reads as many bytes as the weights have, once for each step after the first token.

    What it reads is one contiguous buffer of the weights' own size and next to nothing is computed (see
    `icae_fast.benchmark.machine.plain_read`), so that no decoder which reads its weights at every step is expected to
    be faster. It
    lasts as long as the steps themselves would and is timed next to them: on a shared machine the bandwidth
    changes by the minute, and the best one of the whole run would be no bound for any of them.
    """
    call = plain_read(torch.ones(weight_bytes(case) // 4))

    def read():
        for _ in range(case.new_tokens - 1):
            call()

    return read


class Parted:
    """A call that also notes how long it took up to a moment within it, and from there on.

    Args:
        call: gives its result and the moment by `time.perf_counter`.

    Attributes:
        before, after: seconds of the two parts, call by call.
    """

    def __init__(self, call: Callable[[], tuple[Any, float]]) -> None:
        self._call = call
        self.before: list[float] = []
        self.after: list[float] = []

    def __call__(self) -> Any:
        """Make the call; gives its result."""
        start = time.perf_counter()
        result, moment = self._call()
        end = time.perf_counter()
        self.before.append(moment - start)
        self.after.append(end - moment)
        return result


def middle(times: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median and min of times, scaled."""
    return {"median": statistics.median(times) * scale, "min": min(times) * scale}


def step_facts(steps: int, after: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What a row says about the tokens after the first.

    Args:
        steps: how many; after: each provider's seconds for them, round by round.

    Returns:
        `step_ms`, milliseconds a token of each provider (median and min); `step_speedup_over`, how many times as long
        as icae_fast's each other one's take, of the ratios round by round (median, min, max, of_minima).
    """
    return {
        "step_ms": {name: middle(times, 1e3 / steps) for name, times in after.items()},
        "step_speedup_over": {name: speedup(after[OURS], times) for name, times in after.items() if name != OURS},
    }


def bandwidth_facts(n_bytes: int, steps: int, after: Sequence[float], read: Sequence[float]) -> dict[str, Any]:
    """What a row says about the bandwidth bound.

    Args:
        n_bytes: that a step reads.
        steps: how many steps, and how many reads of as many bytes.
        after, read: seconds for these and for those, round by round.

    Returns:
        `weight_bytes`; `step_gbs` and `read_gbs`, 10^9 bytes a second at the median; `fraction_of_read`, the time of
        reading over that of the steps, round by round (median, min, max, of_minima).
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
    """Times of both baselines for all prompts, from those for some.

    Args:
        prompts, measured: how many there are and how many were asked.
        by_prompt: seconds of compressing and asking for each that was asked, round by round.
        compress, asking: seconds of compressing once, and of asking then.

    Returns:
        Each baseline's times, and in words how they were had; the words are missing if all prompts were asked.
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
def kv_noted() -> Iterator[list[int]]:
    """While it is open, the bytes of keys and values of every session that icae_fast decodes in are put on the list."""
    held: list[int] = []

    def noted(*arguments, **options):
        session = DecodeSession(*arguments, **options)
        held.append(session.nbytes)
        return session

    with mock.patch.object(answers, "DecodeSession", noted):
        yield held


def kv_facts(case: Case, n_bytes: int, own_tokens: int) -> dict[str, Any]:
    """What a row says about keys and values.

    Args:
        case: whose prompts share one document's memory.
        n_bytes: of all that the decoding held.
        own_tokens: of all rows behind the slots, prompts and answers, which no two rows can share.

    Returns:
        `kv`: `mb` (10^6 bytes) in all, `memory_mb` of one memory's slots, `own_mb` of the rows' own tokens, and
        `memories`, how many times the slots' keys and values the rest is: 1 and a little for what stands before the
        slots if all rows share one memory, `case.prompts` if each has its own.
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
    """Raise unless there is an answer of the right length to each prompt, each greedy by the baseline on these slots.

    Raises:
        AssertionError: see `icae_fast.benchmark.checks.assert_greedy`.
    """
    assert len(given) == len(asked), f"there are {len(given)} answers to {len(asked)} prompts"
    forbidden = models.icae.eos_token_ids
    for prompt, answer in zip(asked, given, strict=True):
        assert len(answer) == case.new_tokens, f"an answer has {len(answer)} tokens instead of {case.new_tokens}"
        prefix, suffix = models.icae.prompt_ids(prompt)
        assert_greedy(models.baseline, slots, prefix, suffix, answer, forbidden, case.torch_dtype)
