"""The trainer on a tiny model: gradients, resume, NaN, full disks, evaluation, and two processes."""

import contextlib
import json
import math
import resource
import signal
from pathlib import Path

import pytest
import torch

from helpers import golden
from icae_fast import ICAE
from icae_fast.errors import CheckpointError, ConfigError, NonFiniteError, OutputError
from icae_fast.io.files import load_tensors
from icae_fast.training.loop import checkpoint_folder
from icae_fast.training.loop.checkpoint_folder import OPTIMIZER_FILE, find_checkpoint
from icae_fast.training.loop.model import NAMES
from icae_fast.training.loop.report import SAMPLES_FILE, LogInterval, Scores
from icae_fast.training.methods.batch import pack
from training_worker import CountingStream, launch, make_icae, make_trainer

WORKER = Path(__file__).with_name("training_worker.py")
pytestmark = pytest.mark.usefixtures("one_thread")


def run_worker(folder, processes=1, **options):
    """Run training in a new process, or in several."""
    return launch(WORKER, folder, json.dumps(options), processes=processes)


def train(trainer, folder):
    """Train from the newest checkpoint, if there is one."""
    found = find_checkpoint(Path(folder), "auto")
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    return trainer


def curve(trainer):
    """Return the log without times and memory."""
    timed = ("second", "runtime", "memory", "train_loss")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in trainer.state.log_history]


def trained(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.icae.reference_named_parameters()}


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = train(make_trainer(whole, steps=9, evaluate=True), whole)
    died = run_worker(killed, steps=9, evaluate=True, kill_at=5)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert find_checkpoint(killed, "auto").name == "checkpoint-4"  # in the middle of an epoch and of a log interval
    resumed = train(make_trainer(killed, steps=9, evaluate=True), killed)
    assert len(curve(reference)) == 9  # three log lines, five evaluations, the summary
    assert curve(resumed) == curve(reference)
    ours, theirs = trained(resumed), trained(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_gradients_are_those_of_the_whole_step(tmp_path):
    trainer = train(make_trainer(tmp_path, steps=1, dropout=0.0, max_grad_norm=1e9, logging_steps=1), tmp_path)
    icae = make_icae(lora_dropout=0.0).train()
    stream = iter(CountingStream(icae))
    samples = [sample for _ in range(4) for sample in next(stream)]
    batch = pack(samples)
    rows = [batch.contexts, batch.prompts, batch.label_rows]
    icae(*rows)["loss"].backward()
    gradient = torch.load(tmp_path / "gradient.pt")
    for name, parameter in icae.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradient[f"icae.{name}"], parameter.grad, rtol=1e-4, atol=1e-7)
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(icae(*rows)["loss"].item(), rel=1e-5)


# Sharding the base model does not change the result, and a sharded run resumes.
@pytest.mark.parametrize("options", [{"legs": [4]}, {"legs": [2, 4], "shard_base": True}], ids=["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path, options):
    one, two = tmp_path / "one", tmp_path / "two"
    common = {"dropout": 0.0, "logging_steps": 1, "evaluate": True, "lr_scheduler_type": "constant"}
    trainer = train(make_trainer(one, steps=4, **common), one)
    ran = run_worker(two, processes=2, **common, **options)
    assert ran.returncode == 0, ran.stderr
    ours, theirs = torch.load(two / "gradient.pt"), torch.load(one / "gradient.pt")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-8)
    ours, theirs = load_tensors(two / "checkpoint-4" / "adapter.safetensors")[0], trained(trainer)
    assert ours.keys() == theirs.keys()
    lines, expected = json.loads((two / "log.json").read_text()), trainer.state.log_history
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for key in {"grad_norm", "loss", "loss_ae", "loss_lm", "eval_loss", "eval_restored", "tokens"} & other.keys():
            assert line[key] == pytest.approx(other[key], rel=1e-4), key


def test_an_interrupt_in_one_process_ends_and_saves_all(tmp_path):
    ran = run_worker(tmp_path, processes=2, steps=6, interrupt_at=2, save_steps=10)
    assert ran.returncode != 0
    assert "KeyboardInterrupt" in ran.stderr
    found = find_checkpoint(tmp_path, "auto")
    assert found.name == "checkpoint-3"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in found.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        train(make_trainer(tmp_path / "no", steps=6, interrupt_at=2, save_strategy="no"), tmp_path / "no")
    assert not (tmp_path / "no" / "checkpoint-3").exists()


def test_nan_stops_and_names_the_samples(tmp_path):
    trainer = make_trainer(tmp_path, poisoned=(20,))
    with pytest.raises(NonFiniteError, match=r"step 3: .* samples NaN; the last checkpoint stands"):
        train(trainer, tmp_path)
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint-2"


def test_nan_is_skipped_and_counted(tmp_path):
    trainer = make_trainer(tmp_path, poisoned=(20,), on_nan="skip", save_steps=1)
    train(trainer, tmp_path)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["skipped_steps"] == 1
    before, after = (load_tensors(tmp_path / f"checkpoint-{s}" / "adapter.safetensors")[0] for s in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(t).all() for t in trained(trainer).values())


@contextlib.contextmanager
def room_for(size):
    """Let no file grow beyond a size, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Less than the record, which is written last; less than the adapter; less than the optimiser's state.
@pytest.mark.parametrize("room", ["record", 4_000, 20_000])
def test_a_full_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch, room):
    trainer = train(make_trainer(tmp_path, steps=2), tmp_path)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-2").iterdir()}
    trainer.state.global_step = 3
    with monkeypatch.context() as patch:
        if room == "record":
            seal = checkpoint_folder._seal
            patch.setattr(checkpoint_folder, "_seal", lambda folder: room_for(100)(seal)(folder))
        with (
            room_for(room if room != "record" else resource.RLIM_INFINITY),
            pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-3 .* earlier checkpoints stand"),
        ):
            trainer._save_checkpoint(trainer.model)
    assert [p.name for p in tmp_path.glob("*checkpoint*")] + [p.name for p in tmp_path.glob(".*")] == ["checkpoint-2"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-2").iterdir()} == whole
    trainer._save_checkpoint(trainer.model)
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint-3"


def test_a_full_disk_in_an_evaluation_is_one_error(tmp_path):
    trainer = train(make_trainer(tmp_path, steps=2, evaluate=True), tmp_path)
    with room_for(10), pytest.raises(OutputError, match=r"samples\.jsonl .* checkpoints stand"):
        trainer.evaluate()
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint-2"


def test_checkpoints_hold_a_loadable_adapter_and_no_base_weights(tmp_path):
    trainer = train(make_trainer(tmp_path, steps=2), tmp_path)
    icae = ICAE.from_pretrained(tmp_path / "checkpoint-2", base_model=trainer.model.icae.base_model)
    assert icae.adapter_hash() == trainer.model.icae.adapter_hash()
    state = torch.load(tmp_path / "checkpoint-2" / OPTIMIZER_FILE)["state"]
    assert len(state) == len(trained(trainer))


def test_evaluation_tells_losses_apart_restores_a_passage_and_keeps_the_best(tmp_path):
    trainer = train(make_trainer(tmp_path, steps=4, evaluate=True, learning_rate=0.3, save_total_limit=1), tmp_path)
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert {"eval_loss_ae", "eval_loss_lm", "eval_restored", "eval_exact_prefix"} <= lines[0].keys()
    best = min(lines, key=lambda line: line["eval_loss"])
    assert trainer.state.best_metric == best["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    samples = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert [s["step"] for s in samples[:2]] == [2, 4]
    assert samples[0]["origin"] == "held out"
    assert samples[0]["original"] != samples[0]["restored"]


def test_which_checkpoint_is_resumed(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    train(make_trainer(tmp_path, steps=4), tmp_path)
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint-4"
    (tmp_path / "checkpoint-4" / OPTIMIZER_FILE).unlink()
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint-2"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2")).name == "checkpoint-2"
    with pytest.raises(CheckpointError, match="lacks optimizer"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-4"))
    with pytest.raises(ConfigError, match="resume"):
        find_checkpoint(tmp_path, "never")


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    train(make_trainer(tmp_path, steps=2), tmp_path)
    path = tmp_path / "checkpoint-2" / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        train(make_trainer(tmp_path, steps=4), tmp_path)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="another config"):
        train(make_trainer(tmp_path, steps=4, dropout=0.5), tmp_path)


def test_a_log_interval_continues_from_its_state():
    whole, first = LogInterval(), LogInterval()
    rows = [
        Scores(torch.rand(len(NAMES), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)))
        for i in range(4)
    ]
    for i, row in enumerate(rows):
        whole.add(row, 10, 5)
        if i < 2:
            first.add(row, 10, 5)
    second = LogInterval()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for row in rows[2:]:
        second.add(row, 10, 5)
    ours, theirs = second.drain(), whole.drain()
    assert {k: v for k, v in ours.items() if "second" not in k} == {
        k: v for k, v in theirs.items() if "second" not in k
    }


def test_a_head_tied_to_the_embeddings_is_not_saved(tmp_path, monkeypatch):
    base = golden.load_base()
    base.lm_head.weight = base.model.embed_tokens.weight
    monkeypatch.setattr(golden, "load_base", lambda: base)
    trainer = train(make_trainer(tmp_path, steps=2), tmp_path)
    loaded = ICAE.from_pretrained(tmp_path / "checkpoint-2", base_model=base)
    assert loaded.adapter_hash() == trainer.model.icae.adapter_hash()
