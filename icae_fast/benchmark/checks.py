"""Checks, made before anything is timed, that two providers' results are equal up to rounding."""

from __future__ import annotations

import torch

from icae_fast.benchmark.baseline import BaselineICAE

# RMS of the difference over RMS of the values. In bf16 a stack of 30 layers rounds about a hundred times in a row
# (2 ** -9 each), and every provider in a different order. SmolLM2's slots were 1.2e-2 from the baseline's, both for
# icae_fast and for merged weights.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}

# How far a greedy token's logit may be below the maximum, over the logits' standard deviation. The baseline's bf16
# logits of SmolLM2 were 0.04 (RMS) and at most 0.25 from the fp32 ones.
GREEDY_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.25}


def rms_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the RMS of a - b as a fraction of the RMS of b."""
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def assert_same(
    a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, what: str, tolerance: float | None = None
) -> None:
    """Assert that `rms_difference` is within the tolerance of the dtype that both were computed in.

    Args:
        a, b: values of equal shape.
        dtype: dtype of the computation.
        what: name of the values, for the message.
        tolerance: replaces that of `TOLERANCE`.
    """
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    difference, allowed = rms_difference(a, b), TOLERANCE[dtype] if tolerance is None else tolerance
    assert difference <= allowed, f"{what} differ by {difference:.2e} of their RMS, over {allowed:.0e}"


def assert_greedy(
    baseline: BaselineICAE, slots: torch.Tensor, prefix: list[int], suffix: list[int], answer: list[int],
    forbidden: tuple[int, ...], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Assert that every token of an answer is the baseline's argmax at its position, up to `GREEDY_TOLERANCE`.

    Two answers may differ after a near tie and both be right. Each token is therefore judged given the answer's own
    preceding tokens.

    Args:
        baseline: scores the answer.
        slots: the memory's slots, (n * k, d).
        prefix, suffix: ids before and after the slots.
        answer: ids to judge.
        forbidden: ids that could not be chosen (end of sequence under `min_new_tokens`).
        dtype: dtype that the answer was computed in.
    """
    logits = baseline.answer_logits(slots, suffix, answer, prefix)
    logits[:, list(forbidden)] = float("-inf")
    chosen = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
    finite = logits[logits.isfinite()]
    gap = float((logits.amax(1) - chosen).max() / finite.std())
    assert gap <= GREEDY_TOLERANCE[dtype], f"a token of the answer is {gap:.2e} standard deviations below the best one"
