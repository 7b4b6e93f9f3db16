"""A training step of icae_fast under three activation budgets, and of the baseline.

`make bench-train` runs this and `bench_train_*.py` and writes their rows into one file. Targets are in
`bench.harness.targets`.
"""

from bench.harness import steps
from bench.harness.compare import GEMM_BOUND, Outcome, Work
from bench.harness.models import documents_for, models_for
from bench.harness.processes import in_new_process
from bench.harness.shapes import Case
from icae_fast import backend_of
from icae_fast.benchmark.measure import peak_memory
from icae_fast.training.methods.objectives import autoencoding_sample

OPS = (
    "lora_qkv_rope", "lora_qkv_rope_backward", "varlen_attention", "varlen_attention_backward", "rms_norm",
    "rms_norm_backward", "swiglu", "swiglu_backward",
)  # fmt: skip
ROUNDS = 3  # a round takes more than a minute


def peak_of_step(case: Case, provider: str) -> int:
    """Return the working memory, in bytes, of a provider's step that follows a step on half the document."""
    models, document = models_for(case), documents_for(case)[0].tolist()
    with steps.in_training(models.icae, models.training_baseline):
        for ids in (document[: len(document) // 2], document):
            call = steps.step_calls(models.icae, models.training_baseline, autoencoding_sample(models.icae, ids))[
                provider
            ]
            _, peak = peak_memory(call)
    return peak


def test_step(compare, train_case):
    case = train_case
    models, document = models_for(case), documents_for(case)[0].tolist()
    both = icae, baseline = models.icae, models.training_baseline
    with steps.in_training(*both, dropout=False):  # also packs the weights
        half = autoencoding_sample(icae, document[: len(document) // 2])
        calls = steps.step_calls(icae, baseline, half, keep_gradients=True)
        same = {name: call() for name, call in calls.items()}
        steps.assert_same_steps(same, case.torch_dtype)
    with steps.in_training(*both):
        seconds, _ = compare.measure(
            steps.step_calls(icae, baseline, autoencoding_sample(icae, document)),
            lambda results: steps.assert_same_losses(results, steps.DROPOUT_TOLERANCE),
            rounds=ROUNDS,
        )
    peaks = {name: in_new_process(peak_of_step, case, name) for name in calls}
    facts = {
        "case": case.name,
        "objective": "autoencoding",
        "step": "forward and backward of one document, without an optimiser's step",
        "peaks": "each in a process of its own, of the second step",
        "budget_bytes": {name: budget.bytes for name, budget in steps.BUDGETS.items()},
        "loss_of_first_half": {name: step.loss for name, step in same.items()},
    }
    work = Work(GEMM_BOUND[case.torch_dtype], tokens=case.tokens)
    backends = {op: backend_of(op, icae.device) for op in OPS}
    compare.report(Outcome(compare.benchmark.name, facts, seconds, peaks, work, backends))
