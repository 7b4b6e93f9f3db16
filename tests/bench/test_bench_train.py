"""Parts of the training benchmarks: equal steps, extrapolated memory, targets, the table and the plot."""

import copy
import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the harness needs pytest-benchmark")
pytest.importorskip("peft", reason="the baseline needs peft")
pytest.importorskip("matplotlib", reason="plots need matplotlib")

from bench.harness import compare as harness
from bench.harness import encoders, models, overfit, shapes, step_memory, steps, targets
from bench.harness.step_memory import Line, Point
from docs import plots, tables
from icae_fast.training.methods.objectives import autoencoding_sample, continuation_sample

pytestmark = pytest.mark.usefixtures("one_thread")

MACHINE = {"cpu": "AMD EPYC", "threads": 2, "isa": "avx512", "commit": "0" * 40, "cpu_features": ["avx512f"]}
BASELINE, OURS = encoders.BASELINE, harness.OURS
TINY = shapes.TRAIN_WORKLOADS["small"][0]


def ratios(value):
    """Return a ratio that was the same in every round."""
    return {"median": value, "min": value, "max": value, "of_minima": value}


def step_row(seconds=10.0, peak=200):
    """Return a row of `bench_train.py`; the baseline takes 25 s and 1000 bytes."""
    taken = dict.fromkeys(steps.BUDGETS, seconds) | {BASELINE: 25.0}
    return {
        "name": "step", "case": "smollm2-135m-bf16-1x2048", "objective": "autoencoding", "loss_of_first_half": {},
        "seconds": {name: {"median": s, "min": s} for name, s in taken.items()},
        "speedup_over": {BASELINE: ratios(25.0 / seconds)},
        "rates": {name: {"tokens_per_s": 2048 / s} for name, s in taken.items()},
        "peak_bytes": dict.fromkeys(steps.BUDGETS, peak) | {BASELINE: 1000},
    }  # fmt: skip


def memory_row(ours_mb=1000.0, baseline_mb=9000.0):
    """Return a row of `bench_train_memory.py` with one peak for all lengths; the baseline is measured up to 8192."""
    lengths = (4096, 8192, 30720, 65536)
    found = {
        OURS: [Point(n, int(ours_mb * 1e6), n / 512) for n in lengths],
        BASELINE: [Point(n, int(baseline_mb * 1e6), n / 256 if n <= 8192 else None) for n in lengths],
    }
    facts = {"case": "smollm2-135m-bf16", "objective": "continuation", "target_tokens": 512}
    positions = {n: n // 4 + 512 for n in lengths}
    return step_memory.StepMemory("memory", facts, found, positions, None, {}).row(None)


def overfit_row(loss=0.04, restored=8, goal=0.05):
    """Return a row of `bench_train_overfit.py`."""
    found = {
        "passages": 8, "tokens": 64, "slots": 32, "warm_steps": 40, "steps": 100, "seconds": 200.0, "goal": goal,
        "loss": loss, "restored": restored, "losses": [4.0],
    }  # fmt: skip
    return {"name": "overfit", "case": "smollm2", "overfit": found}


@pytest.fixture(scope="module")
def tiny():
    """Return (icae, baseline) of the small workload."""
    found = models.models_for(TINY)
    return found.icae, found.training_baseline


@pytest.mark.parametrize("objective", ["autoencoding", "continuation"])
def test_steps_of_all_providers_are_the_same(tiny, objective):
    ids = models.documents_for(TINY)[0].tolist()
    sample = (
        autoencoding_sample(tiny[0], ids)
        if objective == "autoencoding"
        else continuation_sample(tiny[0], ids[:50], ids[50:])
    )
    with steps.in_training(*tiny, dropout=False):
        found = {name: call() for name, call in steps.step_calls(*tiny, sample, keep_gradients=True).items()}
    assert found.keys() == {BASELINE, *steps.BUDGETS}
    steps.assert_same_steps(found, torch.float32)
    for what, change in (
        ("gradients", {"gradients": {k: -g for k, g in found[OURS].gradients.items()}}),
        ("loss", {"loss": found[OURS].loss * 1.01}),
        ("NaN", {"gradients_finite": False}),
    ):
        wrong = copy.copy(found[OURS])
        for name, value in change.items():
            object.__setattr__(wrong, name, value)
        with pytest.raises(AssertionError, match=what):
            steps.assert_same_steps(found | {OURS: wrong}, torch.float32)


def test_a_step_leaves_no_gradient_and_sees_a_bad_one(tiny):
    icae, baseline = tiny
    sample = autoencoding_sample(icae, models.documents_for(TINY)[0].tolist())
    with steps.in_training(icae, baseline):
        assert icae.adapter.training
        assert baseline.decoder.training
        calls = steps.step_calls(icae, baseline, sample)
        assert all(call().gradients is None for call in calls.values())
        assert all(p.grad is None for m in tiny for p in m.parameters())
        weight = icae.adapter.layers[0]["q_A"]
        kept = weight.detach().clone()
        try:
            weight.data.fill_(math.nan)
            assert not calls[OURS]().gradients_finite
        finally:
            weight.data.copy_(kept)
    assert not icae.training
    assert not baseline.training


def test_dropout_is_off_where_it_is_asked_for(tiny):
    icae, baseline = tiny
    sample = autoencoding_sample(icae, models.documents_for(TINY)[0].tolist())
    for dropout in (False, True):
        with steps.in_training(icae, baseline, dropout=dropout):
            for call in steps.step_calls(icae, baseline, sample).values():
                assert (call().loss == call().loss) is not dropout


def test_a_line_goes_through_the_upper_half():
    points = [Point(n, peak, 1.0) for n, peak in ((1, 900), (2, 20), (4, 40), (8, 80))]
    line = Line.through(points)
    assert math.isclose(line.slope, 10.0)
    assert abs(line.intercept) < 1e-6
    assert line.error < 1e-9
    assert line.at(16) == 160
    assert Line.through(points[:2]).at(3) == -860  # two points are all
    bent = [Point(n, peak, 1.0) for n, peak in ((1, 1), (2, 2), (4, 40), (8, 80), (16, 100))]
    assert 0.05 < Line.through(bent).error < 0.3


@pytest.mark.parametrize("limit", [None, "memory", "time"])
def test_the_baseline_goes_as_far_as_it_is_affordable(monkeypatch, limit):
    ran = []

    def fake_peak(call):
        call()
        return None, 1000 * ran[-1]

    monkeypatch.setattr(step_memory, "peak_memory", fake_peak)
    if limit == "time":
        monkeypatch.setattr(step_memory, "MAX_SECONDS", 0.0)
    free = 10**12 if limit != "memory" else int(9_000 / step_memory.MEMORY_SHARE)
    calls = {n: lambda n=n: ran.append(n) for n in (2, 4, 8, 16)}
    points, stopped = step_memory.measure_affordable(calls, lambda: free)
    expected = {None: [2, 4, 8, 16], "memory": [2, 4, 8], "time": [2, 4]}[limit]
    assert ran == [p.tokens for p in points if not p.extrapolated] == expected
    assert [p.peak for p in points] == [2000, 4000, 8000, 16000]
    if limit is None:
        assert stopped is None
    else:
        assert stopped["tokens"] == 2 * expected[-1]
        assert stopped["expected_bytes"] == 2000 * expected[-1]
        over = stopped["expected_bytes"] > stopped["allowed_bytes"]
        assert over is (limit == "memory")


def test_positions_are_put_back(tiny):
    before = tiny[0].max_positions
    with step_memory.positions_up_to(tiny[0], before + 5):
        assert tiny[0].max_positions == before + 5
    with step_memory.positions_up_to(tiny[0], 1):
        assert tiny[0].max_positions == before
    assert tiny[0].max_positions == before


def test_a_row_of_memory_says_what_was_not_measured():
    row = memory_row(1000.0, 9000.0)
    points = row["memory"][BASELINE]["points"]
    assert [p["extrapolated"] for p in points] == [False, False, True, True]
    assert [p["seconds"] for p in points] == [16.0, 32.0, None, None]
    assert points[1] == {
        "tokens": 8192, "positions": 2560, "peak_mb": 9000.0, "seconds": 32.0, "extrapolated": False,
    }  # fmt: skip
    assert abs(row["memory"][OURS]["bytes_per_token"]) < 1e-3


def test_learning_by_heart_lowers_the_loss_and_ends_at_the_goal():
    case = shapes.OVERFIT_WORKLOADS["small"][0]
    icae = overfit.new_icae(case)
    passages = overfit.passages_for(case, icae)
    assert [len(p) for p in passages] == [case.tokens] * case.passages
    learned = overfit.learn(case, icae, passages)
    assert not icae.training
    assert len(learned["warm_losses"]) == case.warm_steps
    assert len(learned["losses"]) == case.max_steps
    assert learned["losses"][-1] < learned["losses"][0]
    assert not learned["reached"]
    exact = overfit.restored(icae, passages)
    assert exact == [False] * case.passages  # three steps teach nothing


class Knows(torch.nn.Module):
    """A stub of `TrainingModel` with a low loss from the start and correct labels from the second step."""

    def __init__(self, icae):
        super().__init__()
        self.icae, self.calls = icae, 0

    def forward(self, **batch):
        self.calls += 1
        counts = torch.tensor([4.0, 0.0])
        return {
            "loss": self.icae.memory_token_embed.weight.square().mean(),
            "counts": counts,
            "correct": counts - torch.tensor([float(self.calls == 1), 0.0]),
        }


def test_learning_ends_when_all_passages_come_back(monkeypatch):
    asked = iter([[True, False], [True, True]])
    monkeypatch.setattr(overfit, "TrainingModel", Knows)
    monkeypatch.setattr(overfit, "restored", lambda icae, passages: next(asked))
    case = dataclasses.replace(shapes.OVERFIT_WORKLOADS["small"][0], goal=100.0, warm_steps=0, max_steps=9)
    icae = overfit.new_icae(case)
    learned = overfit.learn(case, icae, overfit.passages_for(case, icae))
    # Step 1 has wrong labels, step 2 a wrong passage, and step 3 ends without an update.
    assert len(learned["losses"]) == 3
    assert learned["reached"]
    row = overfit.Overfit("overfit", case, learned, [True, True], 1.0, {}).row(None)
    assert (row["overfit"]["steps"], row["overfit"]["restored"]) == (2, 2)


def test_what_is_restored_is_judged_to_the_end():
    class Restores:
        eos_token_ids = (2,)

        def compress(self, passages):
            return passages

        def restore(self, memories, return_ids):
            return [[*memories[0].tolist(), 2], memories[1].tolist(), [*memories[2].tolist()[:-1], 9, 2]]

    assert overfit.restored(Restores(), list(torch.arange(3, 12).view(3, 3))) == [True, False, False]


def verdicts(*rows):
    """Return the last column of the table of targets."""
    lines = targets.render(MACHINE, rows).splitlines()
    assert "…" not in "".join(lines)
    return [next((v for v in ("met", "missed") if v in line), "") for line in lines if line.startswith("│")]


def test_targets():
    # Speed and peak are judged for icae_fast's default budget only.
    assert verdicts(step_row()) == ["met", "met", "", "", "", ""]
    assert verdicts(step_row(seconds=13.0, peak=251)) == ["missed", "missed", "", "", "", ""]
    # The peak at 8,192, 30,720 and 65,536, and the two slopes.
    assert verdicts(memory_row()) == ["met", "met", "met", "", ""]
    assert verdicts(memory_row(ours_mb=5000.0)) == ["missed", "missed", "met", "", ""]
    assert verdicts(memory_row(ours_mb=7000.0)) == ["missed", "missed", "missed", "", ""]
    assert verdicts(overfit_row()) == ["met", "met", "", ""]
    assert verdicts(overfit_row(loss=0.06, restored=7)) == ["missed", "missed", "", ""]
    assert targets.render(MACHINE, [overfit_row(goal=None)]) == ""


def test_the_table_says_what_is_extrapolated():
    result = {"machine": MACHINE, "rows": [step_row(), memory_row(), overfit_row()]}
    text = tables._train(result, "plot.svg")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "| `smollm2-135m-bf16-1x2048`, autoencoding | icae_fast | 10 | 205 | 0.0002 | 0.2 |" in lines
    assert "| 8,192 tokens, continuation of 512 | baseline | 32 | 256 | 9000 | 1 |" in lines
    assert "| 65,536 tokens, continuation of 512 | baseline | - | - | 9000 (extrapolated) | 1 |" in lines
    assert "| 65,536 tokens, continuation of 512 | icae_fast | 128 | 512 | 1000 | 0.11 |" in lines
    assert "![Peak memory of a training step against its context](plot.svg)" in text
    assert "8 of 8 come back exactly" in text


def test_the_plot_is_drawn_and_the_same_each_time(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    (tmp_path / "train-amd.json").write_text(json.dumps({"rows": [step_row(), memory_row()]}))
    (tmp_path / "train-other.json").write_text(json.dumps({"rows": [step_row()]}))
    plots.main()
    assert {p.name for p in tmp_path.iterdir()} == {
        "train-amd.json", "train-other.json", "train-memory-amd.svg", "train-memory-amd.png",
    }  # fmt: skip
    first = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert b"extrapolated" in first[tmp_path / "train-memory-amd.svg"]
    plots.main()
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == first
