"""Training with a sharded base model (FSDP2) equals training without; and rejected options of a launch."""

import os
from pathlib import Path

import pytest
import torch

from icae_fast.errors import ConfigError
from icae_fast.training.loop.model import TrainingModel
from icae_fast.training.loop.sharding import check_launch, shard_base_model, take_over_launch
from training_worker import launch, make_icae

WORKER = Path(__file__).with_name("sharding_worker.py")
BUDGETS = ("none", "some", "default", "everything")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The results of two processes."""
    path = tmp_path_factory.mktemp("sharding") / "found.pt"
    ran = launch(WORKER, path, processes=2)
    assert ran.returncode == 0, ran.stderr
    return torch.load(path)


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_of_unequal_processes_are_those_of_one(processes, budget):
    for process in processes:
        loss, gradients, _ = process["budgets"][budget]["found"]
        expected_loss, expected = process["budgets"][budget]["expected"]
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


def test_some_micro_batches_run_again_in_one_process_alone(processes):
    """Guard the tests above: processes with unequal numbers must agree on a schedule."""
    (first_kept, first_spans), (second_kept, second_spans) = (process["kept"]["some"] for process in processes)
    assert (first_spans, second_spans) == (2, 6)
    assert first_kept == first_spans
    assert 0 < second_kept < second_spans


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_process_holds_its_share_alone_after_a_step(processes, budget):
    before, *_ = (process["budgets"][budget]["found"][2][0] for process in processes)
    after = [process["budgets"][budget]["found"][2][1] for process in processes]
    assert before <= sum(after) < 1.01 * before  # an odd number of rows is padded
    assert max(after) < 0.51 * before


def test_gathered_weights_are_let_go_of(processes):
    for process in processes:
        whole, left = process["gathered"]
        assert whole >= process["budgets"]["none"]["found"][2][0]
        assert left == 0


def test_losses_without_a_graph_are_the_same(processes):
    for process in processes:
        found, expected = process["losses"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_plain_autograd_is_refused(processes):
    assert all("train by `ICAE.token_losses`" in process["refusal"] for process in processes)


def test_one_process_alone_is_refused():
    with pytest.raises(ConfigError, match="several processes"):
        shard_base_model(TrainingModel(make_icae()))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "--multi_gpu"),
        ({"ACCELERATE_USE_FSDP": "true"}, "--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "launch with --fsdp_offload_params false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "launch with --fsdp_activation_checkpointing false"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "launch with --fsdp_reshard_after_forward true"),
    ],
)
def test_what_of_a_launch_is_refused(variables, message):
    fsdp2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if next(iter(variables)).startswith("FSDP") else {}
    with pytest.raises(ConfigError, match=message):
        check_launch(fsdp2 | variables)


def test_accelerate_does_not_see_the_launch(monkeypatch):
    for variable, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(variable, value)
    check_launch()
    assert take_over_launch()
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    assert not take_over_launch()
