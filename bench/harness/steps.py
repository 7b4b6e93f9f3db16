"""What the benchmarks of training share: a step of icae_fast and of the baseline, and when the two are the same.

A step is the forward and backward of one document. There is no optimiser's in it: both sides train the same
parameters, and would take the same.
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

# Of the loss. The baseline's is a bf16 number, 0.4 % from the next, and a mean of losses of bf16 logits: SmolLM2's lay
# up to 1.2 % from it, and 1.0 % from the fp32 one.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Each provider draws a dropout of its own, 0.05 of LoRA's input.
DROPOUT_TOLERANCE = 5e-2

Call = Callable[[], "Step"]


@dataclass(frozen=True)
class Step:
    """What a step gave.

    Args:
        loss: mean over the labels.
        gradients_finite: of all trained parameters.
        gradients: by the reference's names, where they were asked for.
    """

    loss: float
    gradients_finite: bool
    gradients: dict[str, torch.Tensor] | None = None


def our_step(icae: ICAE, sample: Sample, budget: ActivationBudget, keep_gradients: bool = False) -> Step:
    """A step of icae_fast under an activation budget."""
    context, prompt, labels = (torch.tensor(v) for v in (sample.input_ids, sample.prompt_answer_ids, sample.labels))
    loss = icae.token_losses([context], [prompt], [labels], budget).losses.mean()
    return _backward(loss, dict(icae.reference_named_parameters()), keep_gradients)


def baseline_step(baseline: BaselineICAE, sample: Sample, keep_gradients: bool = False) -> Step:
    """A step of the baseline. Its logits are not held beyond the forward, as the reference's `Trainer` does not."""
    rows = (torch.tensor([v]) for v in (sample.input_ids, sample.prompt_answer_ids, sample.labels))
    loss = baseline(*rows)["loss"]
    parameters = {name: p for name, p in baseline.named_parameters() if p.requires_grad}
    return _backward(loss, parameters, keep_gradients)


def _backward(loss, parameters, keep):
    loss.backward()
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    finite = len(found) == len(parameters) and all(bool(g.isfinite().all()) for g in found.values())
    for parameter in parameters.values():
        parameter.grad = None
    return Step(loss.item(), finite, found if keep else None)


def step_calls(icae: ICAE, baseline: BaselineICAE, sample: Sample, keep_gradients: bool = False) -> dict[str, Call]:
    """A call for each provider: the baseline, and icae_fast with each of `BUDGETS`."""
    ours = {
        name: lambda budget=budget: our_step(icae, sample, budget, keep_gradients) for name, budget in BUDGETS.items()
    }
    return {BASELINE: lambda: baseline_step(baseline, sample, keep_gradients)} | ours


@contextlib.contextmanager
def in_training(*models: nn.Module, dropout: bool = True) -> Iterator[None]:
    """Training mode, with the baseline's checkpointing, and with dropout or without; evaluation mode afterwards."""
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
    """Raise unless every trained parameter of each step had a finite gradient."""
    for name, step in steps.items():
        assert step.gradients_finite, f"{name}: a trained parameter has no gradient, or one with NaN or infinity"


def assert_same_losses(steps: Mapping[str, Step], tolerance: float) -> None:
    """Raise unless all losses are the baseline's within a tolerance, and all gradients finite."""
    assert_finite(steps)
    expected = steps[BASELINE].loss
    for name, step in steps.items():
        assert abs(step.loss - expected) <= tolerance * expected, f"{name}: the loss is {step.loss}, not {expected}"


def assert_same_steps(steps: Mapping[str, Step], dtype: torch.dtype) -> None:
    """Raise unless steps without dropout are the same: losses, and in fp32 gradients.

    In bf16 gradients are noise to a good part, for one document: SmolLM2's lay 0.15 to 0.47 of their RMS from the fp32
    ones, and the baseline's 0.09 to 0.84. They are then only to be finite.
    """
    assert_same_losses(steps, LOSS_TOLERANCE[dtype])
    if dtype == torch.float32:
        names = list(steps[BASELINE].gradients)
        packed = {n: torch.cat([step.gradients[key].flatten() for key in names]) for n, step in steps.items()}
        for name, gradients in packed.items():
            assert_same(gradients, packed[BASELINE], dtype, f"gradients of {name}")
