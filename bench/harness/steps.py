"""Shared parts of the training benchmarks: a step of icae_fast and of the baseline, and checks that they agree.

A step is the forward and backward of one document. The optimiser's step is left out: both sides train the same
parameters, so it takes the same time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from bench.harness.compare import OURS
from bench.harness.encoders import BASELINE
from icae_fast import ICAE
from icae_fast.benchmark.baseline import BaselineICAE
from icae_fast.benchmark.checks import assert_same
from icae_fast.step.budget import EVERYTHING, ActivationBudget
from icae_fast.training.methods.objectives import Sample

NOTHING_KEPT, ALL_KEPT = f"{OURS} budget 0", f"{OURS} everything kept"
BUDGETS = {NOTHING_KEPT: ActivationBudget(bytes=0), ALL_KEPT: EVERYTHING, OURS: ActivationBudget()}

# Relative difference of losses. The baseline's loss is a bf16 number (0.4 % apart), a mean over bf16 logits: with
# SmolLM2, losses were up to 1.2 % from it, and it was 1.0 % from the fp32 one.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# With dropout every provider draws different masks, over 0.05 of the LoRA's input.
DROPOUT_TOLERANCE = 5e-2

Call = Callable[[], "Step"]


@dataclass(frozen=True)
class Step:
    """The result of a step.

    Args:
        loss: mean over the labels.
        gradients_finite: whether all trained parameters have finite gradients.
        gradients: gradients by the reference's names, None unless they were kept.
    """

    loss: float
    gradients_finite: bool
    gradients: dict[str, torch.Tensor] | None = None


def our_step(icae: ICAE, sample: Sample, budget: ActivationBudget, keep_gradients: bool = False) -> Step:
    """Run a step of icae_fast under an activation budget."""
    context, prompt, labels = (torch.tensor(v) for v in (sample.input_ids, sample.prompt_answer_ids, sample.labels))
    loss = icae.token_losses([context], [prompt], [labels], budget).losses.mean()
    return _backward(loss, dict(icae.reference_named_parameters()), keep_gradients)


def baseline_step(baseline: BaselineICAE, sample: Sample, keep_gradients: bool = False) -> Step:
    """Run a step of the baseline; logits are released after the forward, as by the reference's `Trainer`."""
    rows = (torch.tensor([v]) for v in (sample.input_ids, sample.prompt_answer_ids, sample.labels))
    loss = baseline(*rows)["loss"]
    parameters = {name: p for name, p in baseline.named_parameters() if p.requires_grad}
    return _backward(loss, parameters, keep_gradients)


def _backward(loss: torch.Tensor, parameters: dict[str, nn.Parameter], keep: bool) -> Step:
    loss.backward()
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    finite = len(found) == len(parameters) and all(bool(g.isfinite().all()) for g in found.values())
    for parameter in parameters.values():
        parameter.grad = None
    return Step(loss.item(), finite, found if keep else None)


def step_calls(icae: ICAE, baseline: BaselineICAE, sample: Sample, keep_gradients: bool = False) -> dict[str, Call]:
    """Return a call for each provider: the baseline, and icae_fast with each of `BUDGETS`."""
    ours = {
        name: lambda budget=budget: our_step(icae, sample, budget, keep_gradients) for name, budget in BUDGETS.items()
    }
    return {BASELINE: lambda: baseline_step(baseline, sample, keep_gradients)} | ours


@contextlib.contextmanager
def in_training(*models: nn.Module, dropout: bool = True) -> Iterator[None]:
    """Put models into training mode (with the baseline's checkpointing), and into evaluation mode afterwards.

    Args:
        models: an `ICAE`, a `BaselineICAE`, or both.
        dropout: whether dropout is active.
    """
    for model in models:
        model.train()
        if not dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
            if isinstance(model, ICAE):
                model.adapter.eval()
    try:
        yield
    finally:
        for model in models:
            model.eval()


def assert_finite(steps: Mapping[str, Step]) -> None:
    """Assert that every trained parameter of each step had a finite gradient."""
    for name, step in steps.items():
        assert step.gradients_finite, f"{name}: a trained parameter has no gradient, or one with NaN or infinity"


def assert_same_losses(steps: Mapping[str, Step], tolerance: float) -> None:
    """Assert that all losses are the baseline's within a relative tolerance and that all gradients are finite."""
    assert_finite(steps)
    expected = steps[BASELINE].loss
    for name, step in steps.items():
        assert abs(step.loss - expected) <= tolerance * expected, f"{name}: the loss is {step.loss}, not {expected}"


def assert_same_steps(steps: Mapping[str, Step], dtype: torch.dtype) -> None:
    """Assert that steps without dropout agree: losses, and gradients in fp32.

    In bf16 the gradients of one document are largely noise: SmolLM2's were 0.15 to 0.47 of their RMS from the fp32
    ones, and the baseline's 0.09 to 0.84. They are only checked to be finite.
    """
    assert_same_losses(steps, LOSS_TOLERANCE[dtype])
    if dtype == torch.float32:
        kept: dict[str, dict[str, torch.Tensor]] = {}
        for name, step in steps.items():
            assert step.gradients is not None, f"{name}: the step kept no gradients to compare"
            kept[name] = step.gradients
        packed = {n: torch.cat([gradients[key].flatten() for key in kept[BASELINE]]) for n, gradients in kept.items()}
        for name, gradients in packed.items():
            assert_same(gradients, packed[BASELINE], dtype, f"gradients of {name}")
