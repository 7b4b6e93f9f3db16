"""The latency table: four ways to get an answer about a document, timed in interleaved rounds of one run.

result = latency_table(icae, document_ids, prompt_ids, new_tokens=32, rounds=3)
rich.print(render(result))
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from icae_fast import ICAE, Memory, backend_of
from icae_fast.benchmark.baseline import BaselineICAE
from icae_fast.benchmark.checks import assert_greedy, assert_same
from icae_fast.benchmark.machine import Bounds, describe_machine, synchronize
from icae_fast.benchmark.measure import FirstToken, interleave, pair_ratios, peak_memory, rounded
from icae_fast.benchmark.shapes import ModelShape

RAW, BASELINE, COLD, STORED = "raw context", "baseline ICAE", "icae_fast, cold", "icae_fast, stored memory"


@dataclass(frozen=True)
class Timing:
    """Timing of one answer.

    Args:
        compress_s: seconds until the memory was ready, None if nothing is compressed.
        first_token_s: seconds until the first token, compression included.
        total_s: seconds until the last token.
        answer: the new ids.
        slots: the slots that were made, None if none were.
    """

    compress_s: float | None
    first_token_s: float
    total_s: float
    answer: list[int]
    slots: torch.Tensor | None

    def per_token_ms(self) -> float | None:
        """Return the milliseconds per token after the first, None for an answer of one token."""
        return (self.total_s - self.first_token_s) / (len(self.answer) - 1) * 1e3 if len(self.answer) > 1 else None


class _Rows:
    """The rows of the table, each a call without arguments that returns a `Timing`."""

    def __init__(
        self, icae: ICAE, baseline: BaselineICAE, document: torch.Tensor, prompt: list[int], new_tokens: int
    ) -> None:
        self.icae, self.baseline = icae, baseline
        self.document, self.prompt, self.n = document, prompt, new_tokens
        self.prefix, self.suffix = icae.prompt_ids(prompt)
        self.stored = icae.compress([document])[0]

    def calls(self) -> dict[str, Callable[[], Timing]]:
        """Return the calls by row name, in the table's order."""
        return {RAW: self.raw, BASELINE: self.baseline_icae, COLD: self.cold, STORED: self.from_store}

    def _timed(
        self, compress: Callable[[], Any] | None, answer: Callable[[Any, FirstToken], list[int]], skip: int = 0
    ) -> Timing:
        """Time `compress` and then `answer`, which is called with the memory and a streamer."""
        clock, compressed, memory = FirstToken(skip), None, None
        synchronize(self.icae.device)
        start = time.perf_counter()
        if compress is not None:
            memory = compress()
            synchronize(self.icae.device)
            compressed = time.perf_counter() - start
        ids = answer(memory, clock)
        synchronize(self.icae.device)
        total = time.perf_counter() - start
        slots = memory.slots if isinstance(memory, Memory) else memory
        assert clock.at is not None, "the answer has no token, so there is no time of the first one"
        return Timing(compressed, clock.at - start, total, ids, slots)

    def raw(self) -> Timing:
        """Answer from template, document and prompt with the plain base model and transformers' `generate`."""
        row = [*self.prefix, *self.document.tolist(), *self.suffix]
        row = [i for i in row if i < self.baseline.n_base]  # without FT, which only ICAE knows
        ids = torch.tensor([row], device=self.icae.device)

        def answer(_: None, clock: FirstToken) -> list[int]:
            out = self.icae.base_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.n, min_new_tokens=self.n,
                do_sample=False, num_beams=1, use_cache=True, streamer=clock,
                pad_token_id=next(iter(self.icae.eos_token_ids), None),
            )  # fmt: skip
            return out[0, ids.shape[1] :].tolist()

        return self._timed(None, answer, skip=1)

    def baseline_icae(self) -> Timing:
        """Compress and answer with the baseline."""
        return self._timed(
            lambda: self.baseline.compress(self.document),
            lambda slots, clock: self.baseline.generate(
                slots, self.suffix, self.prefix, self.n, self.n, self.icae.eos_token_ids, streamer=clock
            ),
        )

    def _answer(self, memory: Memory, clock: FirstToken) -> list[int]:
        self.icae.clear_kv()  # a first question: the slots' keys and values are not computed yet
        return self.icae.generate(
            memory, [self.prompt], max_new_tokens=self.n, min_new_tokens=self.n, return_ids=True, streamer=clock
        )[0]

    def cold(self) -> Timing:
        """Compress and answer with icae_fast."""
        return self._timed(lambda: self.icae.compress([self.document])[0], self._answer)

    def from_store(self) -> Timing:
        """Answer with icae_fast from an existing memory."""
        return self._timed(None, lambda _, clock: self._answer(self.stored, clock))

    def check(self, timings: dict[str, Timing]) -> None:
        """Assert that the baseline and icae_fast agree up to rounding and that all answers have `n` tokens."""
        slots, cold_slots = timings[BASELINE].slots, timings[COLD].slots
        assert slots is not None, "the baseline returned no slots"
        assert cold_slots is not None, "icae_fast returned no slots"
        assert_same(cold_slots.to(slots), slots, self.icae.dtype, "slots")
        for name, timing in timings.items():
            assert len(timing.answer) == self.n, f"{name} returned {len(timing.answer)} tokens instead of {self.n}"
            if name != RAW:
                own = self.stored.slots if timing.slots is None else timing.slots
                sides = (self.prefix, self.suffix, timing.answer)
                assert_greedy(self.baseline, own, *sides, self.icae.eos_token_ids, self.icae.dtype)


def latency_table(
    icae: ICAE, document_ids: Sequence[int] | torch.Tensor, prompt_ids: Sequence[int] | torch.Tensor,
    new_tokens: int = 32, rounds: int = 3, baseline: BaselineICAE | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Time four ways to answer a prompt about a document.

    One untimed call of each row warms it up and measures its peak memory; the baseline's and icae_fast's results of
    these calls must agree. The rows are then timed in interleaved rounds in this process.

    Args:
        icae: the model; its base model also reads the raw context.
        document_ids: ids of base tokens, (L,).
        prompt_ids: ids of base tokens.
        new_tokens: tokens of every answer; no answer ends earlier.
        rounds: number of rounds; medians are reported.
        baseline: a baseline with the same weights; None makes one from `icae` (a second copy of the weights).

    Returns:
        JSON values: `machine`, `bounds`, `backends`, `model`, `dtype`, `document_tokens`, `prompt_tokens`, `slots`,
        `new_tokens`, `rounds`, `least_ms_per_token` (time to read the layers' and the head's weights once at the
        measured bandwidth), and `rows`. Each row has `name`, the medians `compress_s` (None if nothing is compressed),
        `first_token_s` (compression included), `per_token_ms` (after the first token; None for a single token) and
        `total_s`, `peak_mb` (10^6 bytes above the weights), and `speedup_over_baseline` (baseline's total over the
        row's, round by round: median, min, max).

    Raises:
        ValueError: new_tokens or rounds is below 1.
        AssertionError: the two implementations do not agree.
    """
    if new_tokens < 1 or rounds < 1:
        raise ValueError(f"new_tokens is {new_tokens} and rounds is {rounds}; both must be at least 1")
    document = torch.as_tensor(document_ids, dtype=torch.int64)
    prompt = torch.as_tensor(prompt_ids, dtype=torch.int64).tolist()
    rows = _Rows(icae, baseline or BaselineICAE.from_icae(icae), document, prompt, new_tokens)
    calls = rows.calls()
    first = {name: peak_memory(call, icae.device) for name, call in calls.items()}
    rows.check({name: timing for name, (timing, _) in first.items()})
    bounds = Bounds(icae.device).probe()
    timings = interleave(calls, rounds)
    bounds.probe()
    weights = ModelShape.of(icae.base_model).decode_weights() * icae.base_model.lm_head.weight.element_size()
    return {
        "machine": describe_machine(icae.device),
        "bounds": bounds.as_dict(),
        "backends": {op: backend_of(op, icae.device) for op in ("lora_qkv_rope", "varlen_attention")},
        "model": icae.config.base_model or icae.base_model.config.model_type,
        "dtype": str(icae.dtype).removeprefix("torch."),
        "document_tokens": len(document),
        "prompt_tokens": len(prompt),
        "slots": rows.stored.n_slots,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "least_ms_per_token": rounded(weights / bounds.rates["read"] * 1e3),
        "rows": [rounded(_row(name, timings, first[name][1])) for name in calls],
    }


def _row(name: str, timings: dict[str, list[Timing]], peak: int) -> dict[str, Any]:
    def median(values: Iterable[float | None]) -> float | None:
        found = list(values)
        known = [value for value in found if value is not None]
        return statistics.median(known) if len(known) == len(found) else None

    own = timings[name]
    return {
        "name": name,
        "compress_s": median(t.compress_s for t in own),
        "first_token_s": median(t.first_token_s for t in own),
        "per_token_ms": median(t.per_token_ms() for t in own),
        "total_s": median(t.total_s for t in own),
        "peak_mb": peak / 1e6,
        "speedup_over_baseline": pair_ratios([t.total_s for t in own], [t.total_s for t in timings[BASELINE]]),
    }


def render(result: dict[str, Any]) -> Table:
    """Return the result of `latency_table` as a `rich` table; its caption names the machine and the versions."""
    machine, versions, bounds = result["machine"], result["machine"]["versions"], result["bounds"]
    table = Table(
        title=f"{result['document_tokens']} tokens of text, {result['slots']} slots, prompt of "
        f"{result['prompt_tokens']}, answer of {result['new_tokens']}",
        caption=f"{result['model']}, {result['dtype']}, on {_device(machine)}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}. Medians of {result['rounds']} interleaved rounds. "
        f"Reading the weights once takes {result['least_ms_per_token']:.1f} ms at {bounds['read_gbs']:.1f} GB/s.",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    headings = ("compress\ns", "first\ntoken s", "ms per\ntoken", "total\ns", "peak\nMB", "times as fast\nas baseline")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        ratio = {k: _number(v) for k, v in row["speedup_over_baseline"].items()}
        table.add_row(
            row["name"],
            *(_number(row[key]) for key in ("compress_s", "first_token_s", "per_token_ms", "total_s", "peak_mb")),
            f"{ratio['median']} ({ratio['min']}-{ratio['max']})",
        )
    return table


def _device(machine: dict[str, Any]) -> str:
    if machine["device"] != "cpu":
        return machine["device"]
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['isa'] or 'no C++ kernels'}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"
