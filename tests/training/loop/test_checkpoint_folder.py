"""Damaged checkpoints are found before anything is loaded, whichever file is damaged and however."""

import logging
import shutil

import pytest
import torch

from icae_fast.errors import CheckpointError
from icae_fast.training.loop import checkpoint_folder as folders
from icae_fast.training.loop.checkpoint_folder import find_checkpoint, find_damage, list_checkpoints
from training_worker import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_FILE = (*folders.FILES, "rng_state.pth", folders.RECORD_FILE)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder of a finished run with checkpoints 2 and 4; tests must not change it."""
    output = tmp_path_factory.mktemp("run")
    make_trainer(output, steps=4).train()
    return output


@pytest.fixture
def output(run, tmp_path):
    return shutil.copytree(run, tmp_path / "out")


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n\n"),
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, path.stat().st_size // 2),
    "last bit": lambda path: flip(path, -1),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", EVERY_FILE)
def test_damage_of_any_file_is_found_and_the_checkpoint_before_is_taken(output, name, how, caplog):
    newest = output / "checkpoint-4"
    assert find_checkpoint(output, "auto") == newest
    DAMAGES[how](newest / name)
    with caplog.at_level(logging.WARNING, "icae_fast.training"):
        assert find_checkpoint(output, "auto") == output / "checkpoint-2"
    assert str(newest) in caplog.text
    assert name in caplog.text
    shutil.rmtree(output / "checkpoint-2")
    with pytest.raises(CheckpointError, match=f"no checkpoint in .* is whole: checkpoint-4 .*{name}"):
        find_checkpoint(output, "auto")


def test_any_byte_of_the_record_counts(output):
    record = output / "checkpoint-4" / folders.RECORD_FILE
    whole = record.read_bytes()
    for i in range(len(whole)):
        flip(record, i)
        assert find_damage(output / "checkpoint-4") is not None, i
        record.write_bytes(whole)
    assert find_damage(output / "checkpoint-4") is None


def test_a_valid_file_with_other_content_is_damage(output):
    torch.save({}, output / "checkpoint-4" / folders.OPTIMIZER_FILE)
    shutil.copy(output / "checkpoint-2" / "adapter.safetensors", output / "checkpoint-4")
    assert "optimizer.pt" in find_damage(output / "checkpoint-4") or "adapter" in find_damage(output / "checkpoint-4")
    shutil.copy(output / "checkpoint-4" / folders.RECORD_FILE, output / "checkpoint-2")
    assert find_damage(output / "checkpoint-2") is not None


def test_damaged_ones_are_set_aside_and_do_not_count(output):
    DAMAGES["cut"](output / "checkpoint-4" / folders.OPTIMIZER_FILE)
    found = find_checkpoint(output, "auto")
    folders.set_aside_newer(output, found)
    assert [p.name for p in list_checkpoints(output)] == ["checkpoint-2"]
    assert (output / "damaged-checkpoint-4").is_dir()
    trainer = make_trainer(output, steps=3, save_steps=1, save_total_limit=1)
    trainer.train(resume_from_checkpoint=str(found))
    assert [p.name for p in list_checkpoints(output)] == ["checkpoint-3"]


def test_the_newest_is_kept_although_another_has_a_higher_number(output):
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-4-copy")
    trainer = make_trainer(output, steps=3, save_steps=1, save_total_limit=1)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert [p.name for p in list_checkpoints(output)] == ["checkpoint-3", "checkpoint-4"]
    assert (output / "checkpoint-4-copy").is_dir()


def test_deleting_is_at_once_and_what_is_left_is_removed_by_the_next_save(output, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # as if killed
        folders.delete_checkpoint(output / "checkpoint-2")
    assert [p.name for p in list_checkpoints(output)] == ["checkpoint-4"]
    assert [p.name for p in output.glob(".*")] == [".checkpoint-2.deleted"]
    make_trainer(output, steps=6).train(resume_from_checkpoint=str(output / "checkpoint-4"))
    assert [p.name for p in list_checkpoints(output)] == ["checkpoint-4", "checkpoint-6"]
    assert not list(output.glob(".*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (folders.OPTIMIZER_FILE, {}),
        (folders.OPTIMIZER_FILE, None),
        (folders.SCHEDULER_FILE, None),
        ("rng_state.pth", {}),
        ("rng_state.pth", None),
        (folders.PROGRESS_FILE, None),
        ("adapter.safetensors", None),
    ],
)
def test_a_named_checkpoint_without_a_record_is_taken_unchecked_or_refused_in_a_sentence(output, name, content, caplog):
    folder = output / "checkpoint-2"
    (folder / folders.RECORD_FILE).unlink()
    with caplog.at_level(logging.WARNING, "icae_fast.training"):
        assert find_checkpoint(output, str(folder)) == folder
    assert "cannot be checked" in caplog.text
    torch.save(content, folder / name) if content is not None else (folder / name).write_bytes(b"{\x00")
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        make_trainer(output, steps=6).train(resume_from_checkpoint=str(folder))


def test_a_finished_run_gives_its_best_adapter_again(tmp_path):
    # The evaluation of step 2 is the best by this metric.
    options = {"steps": 4, "evaluate": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert trainer.state.best_global_step == 2
    again = make_trainer(tmp_path, **options)
    assert again.load_finished(find_checkpoint(tmp_path, "auto"))
    assert again.model.icae.adapter_hash() == trainer.model.icae.adapter_hash()


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 4]),
        (9, None, [1, 2, 3, 4]),
        (3, None, [2, 3, 4]),
        (3, 1, [1, 3, 4]),
        (2, 1, [1, 4]),
        (1, 1, [1, 4]),
        (1, None, [4]),
    ],
)
def test_how_many_are_kept(tmp_path, limit, best, kept):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    folders.keep_newest(tmp_path / "checkpoint-4", limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
