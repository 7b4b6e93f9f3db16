"""Shared parts of the encoding benchmarks: providers, work, checks, and the facts of a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.harness.compare import GEMM_BOUND, OURS, Work
from bench.harness.shapes import Case, encode_flops, encode_gemm_flops, lora_flops_share
from icae_fast.benchmark.checks import TOLERANCE, assert_same
from icae_fast.benchmark.measure import speedup
from icae_fast.core.memory import Memory

BASELINE, MERGED, COMPILED, FROZEN = "baseline", "merged", "merged compiled", "merged compiled frozen"
OURS_FUSED, OURS_MERGED, WITHOUT_LORA = f"{OURS} fused", f"{OURS} merged", f"{OURS} without LoRA"
GEMMS = "gemms"
# Random weights amplify rounding more than trained ones: llama-1b's slots were 3.1e-2 from the baseline's, and those of
# Hugging Face with merged weights 3.3e-2.
RANDOM_TOLERANCE = 2.0
SDPA, EXPANDED = "sdpa", "sdpa expanded"  # attention only


def encoder_work(case: Case) -> Work:
    """Return the least work that compresses the case's documents."""
    flops = encode_flops(case.shape, case.span_lengths, case.memory_size, case.rank)
    return Work(GEMM_BOUND[case.torch_dtype], flops=flops, tokens=case.documents * case.tokens)


def lesser_work(case: Case) -> dict[str, Work]:
    """Return the work of the providers that compute no slots (bare GEMMs) or different ones (without LoRA)."""
    sizes = (case.shape, case.span_lengths, case.memory_size)
    flops = {GEMMS: encode_gemm_flops(*sizes, case.rank), WITHOUT_LORA: encode_flops(*sizes, rank=0)}
    return {name: dataclasses.replace(encoder_work(case), flops=n) for name, n in flops.items()}


def encoder_check(case: Case) -> Callable[[dict[str, Any]], None]:
    """Return a check that all slots are the baseline's and that the GEMMs did the operations of the analysis."""
    gemm_flops = lesser_work(case)[GEMMS].flops
    tolerance = TOLERANCE[case.torch_dtype] * (1.0 if case.shape.bundled else RANDOM_TOLERANCE)

    def check(results: dict[str, Any]) -> None:
        expected = results[BASELINE]
        for name, result in results.items():
            slots = torch.cat([m.slots for m in result]) if isinstance(result, list) else result
            if name == GEMMS:
                assert result == gemm_flops, f"the GEMMs are {result} operations, not {gemm_flops}"
            elif name == WITHOUT_LORA:  # its slots are different ones; tests/bench checks their values
                assert slots.shape == expected.shape
                assert bool(slots.isfinite().all())
            else:
                assert_same(slots, expected, case.torch_dtype, f"slots of {name}", tolerance)

    return check


def encoder_facts(case: Case) -> Callable[[Mapping[str, list[float]]], dict[str, Any]]:
    """Return the `derive` argument of `Compare` for encoders.

    The facts are `time_over_gemms`, icae_fast's time over that of its bare products, and, if both were timed,
    `lora_cost`, the time with the fused LoRA over that without LoRA minus 1, with `lora_flops_share`. Ratios are taken
    round by round: median, min, max and of_minima.
    """

    def derive(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
        facts: dict[str, Any] = {"time_over_gemms": speedup(seconds[GEMMS], seconds[OURS])}
        if WITHOUT_LORA in seconds:
            cost = speedup(seconds[WITHOUT_LORA], seconds[OURS_FUSED])
            facts["lora_cost"] = {name: ratio - 1 for name, ratio in cost.items()}
            facts["lora_flops_share"] = lora_flops_share(case.shape, case.span_lengths, case.memory_size, case.rank)
        return facts

    return derive


def assert_same_beginnings(results: Mapping[str, list[Memory]], dtype: torch.dtype) -> None:
    """Assert that all results begin with the same memories, whatever else was in the batch."""
    longest = max(results.values(), key=len)
    for name, memories in results.items():
        for i, (memory, other) in enumerate(zip(memories, longest, strict=False)):
            assert_same(memory.slots, other.slots, dtype, f"slots {i} of {name}")
