"""Stages with learning rates, each scheduled separately."""

import pytest
import torch
from transformers import TrainingArguments

from icae_fast.errors import ConfigError
from icae_fast.training.methods.curriculum import Curriculum, Stage
from icae_fast.training.methods.schedule import stage_schedule

AE = {"ae": 1.0}


def rates(stages, groups=2, factor=4.0, **arguments):
    """Return the learning rates of the groups at every step, and at two more."""
    arguments = TrainingArguments(learning_rate=1e-3, use_cpu=True, **arguments)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    made = [{"params": [w], "lr": 1e-3 * f} for w, f in zip(weights, (1.0, factor), strict=False)]
    optimizer = torch.optim.SGD(made, lr=1e-3)
    schedule = stage_schedule(optimizer, arguments, Curriculum(stages), factor)
    found = []
    for _ in range(sum(s.steps for s in stages) + 2):
        found.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return found


def test_each_stage_warms_up_and_decays_at_its_own_rate():
    stages = [Stage(4, {"code": 1}, 8, learning_rate=2e-3, token_lr_factor=10.0), Stage(5, AE, 8)]
    found = rates(stages, lr_scheduler_type="linear", warmup_steps=1)
    shapes = [0, 1, 2 / 3, 1 / 3, 0, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0]
    expected = [2e-3 * s for s in shapes[:4]] + [1e-3 * s for s in shapes[4:]]
    factors = [10] * 4 + [4] * 7
    assert [rate for rate, _ in found] == pytest.approx(expected)
    assert [rate for _, rate in found] == pytest.approx([r * f for r, f in zip(expected, factors, strict=True)])


def test_one_group_has_the_stage_s_rate():
    stages = [Stage(2, AE, 8, learning_rate=5e-4), Stage(2, AE, 8)]
    found = rates(stages, groups=1, lr_scheduler_type="constant")
    assert [rate for (rate,) in found] == pytest.approx([5e-4] * 2 + [1e-3] * 4)


def test_a_resumed_schedule_goes_on(tmp_path):
    stages = [Stage(3, AE, 8, learning_rate=5e-4), Stage(3, AE, 8)]
    arguments = TrainingArguments(learning_rate=1e-3, use_cpu=True, lr_scheduler_type="cosine")

    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        return stage_schedule(optimizer, arguments, Curriculum(stages), 1.0)

    first, second = make(), make()
    for _ in range(4):
        first.optimizer.step()
        first.step()
    torch.save(first.state_dict(), tmp_path / "scheduler.pt")
    second.load_state_dict(torch.load(tmp_path / "scheduler.pt", weights_only=True))
    assert second.get_last_lr() == first.get_last_lr()
    for schedule in (first, second):
        schedule.optimizer.step()
        schedule.step()
    assert second.last_epoch == 5
    assert second.get_last_lr() == pytest.approx(first.get_last_lr())


def test_a_schedule_that_watches_the_loss_is_refused():
    stages = [Stage(2, AE, 8, learning_rate=5e-4)]
    with pytest.raises(ConfigError, match="cannot restart with each stage"):
        rates(stages, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)


@pytest.mark.parametrize("name", ["learning_rate", "token_lr_factor"])
@pytest.mark.parametrize("value", [0, -1.0, True, "1e-3", float("inf")])
def test_rates_are_positive_numbers(name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*; it must be a number above 0"):
        Stage(1, AE, 8, **{name: value})


def test_a_curriculum_knows_whether_stages_have_rates():
    assert not Curriculum([Stage(1, AE, 8)]).has_rates
    assert Curriculum([Stage(1, AE, 8), Stage(1, AE, 8, learning_rate=1e-3)]).has_rates
    assert Curriculum([Stage(1, AE, 8, token_lr_factor=2.0)]).has_rates
