"""Peak memory of a training step from 512 to 65,536 context tokens; the baseline is extrapolated where it must be."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from bench.harness import steps
from bench.harness.compare import OURS
from bench.harness.encoders import BASELINE
from bench.harness.models import documents_for, models_for
from bench.harness.processes import in_new_process
from bench.harness.shapes import Case
from bench.harness.step_memory import Point, StepMemory, measure_affordable, positions_up_to
from bench.suites.bench_train import OPS
from icae_fast import backend_of
from icae_fast.step.budget import ActivationBudget
from icae_fast.training.methods.objectives import Sample, continuation_sample

BUDGET = ActivationBudget()


def samples_of(cases: Sequence[Case]) -> dict[int, Sample]:
    """Return a training sample by context tokens; its target is the document's start, which does not affect memory."""
    icae, document = models_for(cases[-1]).icae, documents_for(cases[-1])[0].tolist()
    return {c.tokens: continuation_sample(icae, document[: c.tokens], document[: c.new_tokens]) for c in cases}


def points_of(cases: Sequence[Case], provider: str) -> tuple[list[Point], dict[str, Any] | None]:
    """Run `measure_affordable` on a provider's steps, for icae_fast without limits."""
    models = models_for(cases[-1])
    icae, baseline = models.icae, models.training_baseline

    def step(sample: Sample) -> None:
        found = steps.baseline_step(baseline, sample) if provider == BASELINE else steps.our_step(icae, sample, BUDGET)
        steps.assert_finite({f"{provider}, {len(sample.input_ids)} tokens": found})

    samples = samples_of(cases)
    calls = {n: lambda sample=sample: step(sample) for n, sample in samples.items()}
    free: Callable[[], float] | None = None if provider == BASELINE else lambda: math.inf
    max_seconds = None if provider == BASELINE else math.inf
    positions = max(len(sample.prompt_answer_ids) for sample in samples.values())
    with positions_up_to(icae, positions), steps.in_training(icae, baseline):
        calls[cases[0].tokens]()  # packs the weights, so that they do not count as peak memory
        return measure_affordable(calls, free, max_seconds)


def test_memory(compare, lengthening):
    largest, samples = lengthening[-1], samples_of(lengthening)
    models, shortest = models_for(largest), samples[lengthening[0].tokens]
    with steps.in_training(models.icae, models.training_baseline):
        same = {
            BASELINE: steps.baseline_step(models.training_baseline, shortest),
            OURS: steps.our_step(models.icae, shortest, BUDGET),
        }
    steps.assert_same_losses(same, steps.DROPOUT_TOLERANCE)

    def run():
        return {provider: in_new_process(points_of, lengthening, provider) for provider in (OURS, BASELINE)}

    found = compare.benchmark.pedantic(run, rounds=1)
    facts = {
        "case": f"{largest.model}-{largest.dtype}",
        "objective": "continuation",
        "target_tokens": largest.new_tokens,
        "budget_bytes": {OURS: BUDGET.bytes},
        "gradients": "finite at every length",
        "peaks": "of each provider in a process of its own, one length after another",
    }
    positions = {n: len(sample.prompt_answer_ids) for n, sample in samples.items()}
    backends = {op: backend_of(op, models.icae.device) for op in OPS}
    points = {provider: points for provider, (points, _) in found.items()}
    compare.report(StepMemory(compare.benchmark.name, facts, points, positions, found[BASELINE][1], backends))
