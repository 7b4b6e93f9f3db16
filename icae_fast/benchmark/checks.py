"""Are two providers' results the same up to rounding? Asked before anything is timed."""

from __future__ import annotations

import torch

from icae_fast.benchmark.baseline import BaselineICAE

# RMS of the difference over RMS of the values. In bf16 a layer stack of 30 rounds some hundred times in a row
# (2 ** -9 each), and each provider in its own order: SmolLM2's slots lay 1.2e-2 from the baseline's, icae_fast's as
# well as those of merged weights.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}

# How far below the best a greedy token's logit may be, over the logits' standard deviation. The bf16 logits of
# SmolLM2, the baseline's, lay 0.04 (RMS) and at most 0.25 from the fp32 ones.
GREEDY_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.25}


def rms_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """RMS of a - b as a fraction of the RMS of b."""
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def assert_same(
    a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, what: str, tolerance: float | None = None
) -> None:
    """Raise unless `rms_difference` is within the tolerance of the dtype that both were computed in."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    difference, allowed = rms_difference(a, b), TOLERANCE[dtype] if tolerance is None else tolerance
    assert difference <= allowed, f"{what} differ by {difference:.2e} of their RMS, over {allowed:.0e}"


def assert_greedy(
    baseline: BaselineICAE, slots: torch.Tensor, prefix: list[int], suffix: list[int], answer: list[int],
    forbidden: tuple[int, ...], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise unless every token of an answer is the baseline's own choice at that place, up to rounding.

    Two answers may differ after a near tie and both be right, so each token is judged behind the answer's own
    beginning; see `GREEDY_TOLERANCE`.

    Args:
        forbidden: ids that were not allowed to come (end of sequence under `min_new_tokens`).
    """
    logits = baseline.answer_logits(slots, suffix, answer, prefix)
    logits[:, list(forbidden)] = float("-inf")
    chosen = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
    finite = logits[logits.isfinite()]
    gap = float((logits.amax(1) - chosen).max() / finite.std())
    assert gap <= GREEDY_TOLERANCE[dtype], f"a token of the answer lies {gap:.2e} deviations below the best one"
