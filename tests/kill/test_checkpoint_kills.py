"""A training that is killed while it writes a checkpoint and deletes an older one can always be continued.

A forked process saves and is killed: in one half of the kills at a chosen operation on a file of the output folder, in
the other half after a chosen time, which also falls between the writes of torch's own file writer.
"""

import importlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from icae_fast.io.files import load_tensors
from icae_fast.training.loop.checkpoint_folder import find_checkpoint, find_damage, list_checkpoints

KILLS = int(os.environ.get("ICAE_FAST_KILLS", "24"))
_DELETING = ("os.remove", "os.rmdir", "shutil.rmtree")  # with names relative to an open folder
_OTHERS = ("open", "os.rename", "os.mkdir", "os.listdir", "os.scandir")
pytestmark = [
    pytest.mark.kill,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A trainer at step 6 of an output folder with checkpoints 2 and 4, of which two are kept."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "training" / "loop"))
    worker = importlib.import_module("training_worker")
    made = worker.make_trainer(tmp_path / "out", steps=6, save_total_limit=2)
    made.train()  # leaves checkpoints 4 and 6
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    for step in (2, 4):
        made.state.global_step = step
        made._save_checkpoint(made.model)
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    made.state.global_step = 6
    return made


def save_in_fork(trainer, output, *, at_operation=None, after_seconds=None, count=None):
    """Save a checkpoint in a forked process that kills itself, or is killed; return whether it was killed."""
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event, arguments):
            nonlocal seen
            if event in _DELETING or (event in _OTHERS and str(output) in str(arguments[0])):
                seen += 1
                if seen == at_operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(watch)
            begin = time.perf_counter()
            trainer._save_checkpoint(trainer.model)
            if count is not None:
                count.write_text(json.dumps([seen, time.perf_counter() - begin]))
            code = 0
        finally:
            os._exit(code)
    if after_seconds is not None:
        time.sleep(after_seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("replaces_a_damaged_one", [False, True])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(trainer, tmp_path, replaces_a_damaged_one):
    output, before = tmp_path / "out", tmp_path / "before"
    if replaces_a_damaged_one:
        shutil.copytree(output / "checkpoint-4", output / "checkpoint-6")
        (output / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    shutil.copytree(output, before)
    adapter = load_tensors(output / "checkpoint-4" / "adapter.safetensors")[0]
    save_in_fork(trainer, output, count=tmp_path / "count")
    operations, seconds = json.loads((tmp_path / "count").read_text())
    assert find_checkpoint(output, "auto").name == "checkpoint-6"
    assert [p.name for p in list_checkpoints(output)] == ["checkpoint-4", "checkpoint-6"]
    found = {"checkpoint-4": 0, "checkpoint-6": 0}
    killed = 0
    for i in range(KILLS // 2):
        shutil.rmtree(output)
        shutil.copytree(before, output)
        point = {"at_operation": 1 + (i // 2) * operations // max(KILLS // 4, 1)}
        if i % 2:
            point = {"after_seconds": 1.2 * seconds * (i // 2) / max(KILLS // 4, 1)}
        killed += save_in_fork(trainer, output, **point)
        newest = find_checkpoint(output, "auto")
        found[newest.name] += 1
        assert find_damage(newest) is None, point
        ours = load_tensors(newest / "adapter.safetensors")[0]
        assert all(torch.equal(ours[name], adapter[name]) for name in adapter), point
        trainer._save_checkpoint(trainer.model)  # the continued run
        assert [p.name for p in list_checkpoints(output)] == ["checkpoint-4", "checkpoint-6"], point
        assert not [p for p in output.iterdir() if p.name.startswith(".")], point
    print(f"checkpoints: {killed} kills over {operations} operations, whole afterwards: {found}")
    assert killed >= KILLS // 4
