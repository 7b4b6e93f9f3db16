"""Peak memory of a training step from 512 to 65,536 context tokens; the reference's as far as it goes."""

from bench import steps
from bench.bench_train import OPS
from bench.encoders import BASELINE
from bench.harness import OURS
from bench.models import documents_for, models_for
from bench.step_memory import Point, StepMemory, measure_affordable, positions_up_to
from icae_fast import backend_of
from icae_fast.activations import ActivationBudget
from training.objectives import continuation_sample


def test_memory(compare, lengthening):
    largest = lengthening[-1]
    models, document = models_for(largest), documents_for(largest)[0].tolist()
    both = icae, baseline = models.icae, models.training_baseline
    # What is learned does not matter to memory: the document's own beginning.
    samples = {c.tokens: continuation_sample(icae, document[: c.tokens], document[: c.new_tokens]) for c in lengthening}
    positions = {n: len(sample.prompt_answer_ids) for n, sample in samples.items()}
    budget, shortest = ActivationBudget(), next(iter(samples.values()))
    with positions_up_to(icae, max(positions.values())), steps.in_training(*both):
        # Packs the weights: that is no peak.
        steps.assert_same_losses(
            {BASELINE: steps.baseline_step(baseline, shortest), OURS: steps.our_step(icae, shortest, budget)},
            steps.DROPOUT_TOLERANCE,
        )
        of_baseline, stopped = measure_affordable(
            {n: lambda sample=sample: steps.baseline_step(baseline, sample) for n, sample in samples.items()}
        )
        seconds, peaks = compare.measure(
            {str(n): lambda sample=sample: steps.our_step(icae, sample, budget) for n, sample in samples.items()},
            steps.assert_finite,
            str(largest.tokens),
            rounds=1,
        )
    points = {OURS: [Point(n, peaks[str(n)], seconds[str(n)][0]) for n in samples], BASELINE: of_baseline}
    facts = {
        "case": f"{largest.model}-{largest.dtype}",
        "objective": "continuation",
        "target_tokens": largest.new_tokens,
        "budget_bytes": {OURS: budget.bytes},
        "gradients": "finite at every length",
    }
    backends = {op: backend_of(op, icae.device) for op in OPS}
    compare.report(StepMemory(compare.benchmark.name, facts, points, positions, stopped, backends))
