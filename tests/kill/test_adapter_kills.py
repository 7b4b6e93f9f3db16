"""An adapter that is saved over another one is the old or the new one after a kill, at any line of the writer."""

import collections
import os
import random
import signal
import sys
import time

import pytest
import torch

from icae_fast import ICAE
from icae_fast.io import checkpoints, files
from icae_fast.io.checkpoints import CONFIG_FILE, TENSORS_FILE

pytestmark = [
    pytest.mark.kill,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

KILLS = int(os.environ.get("ICAE_FAST_KILLS", "40"))


@pytest.fixture
def pair(make_icae):
    """Two adapters of one base that differ in weights, sizes and conventions."""
    return make_icae(seed=0), make_icae(seed=0, memory_size=2, lora_rank=5, memory_positions="spread")


def killed(action):
    """Run an action in a forked process that kills itself or is killed; return whether it was."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def wait(pid):
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def save_until(icae, folder, line):
    """Save, and die in front of the writer's line with this number; return the number of lines if there are fewer."""
    writers, seen = {checkpoints.__file__, files.__file__}, 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename not in writers:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        icae.save_pretrained(folder)
    finally:
        sys.settrace(None)
    return seen


def which(folder, base, old, new):
    """Return the name of the adapter that the folder holds, which must be complete."""
    found = ICAE.from_pretrained(folder, base)
    for name, icae in (("old", old), ("new", new)):
        if found.config == icae.config:
            pairs = zip(found.reference_named_parameters(), icae.reference_named_parameters(), strict=True)
            assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
            return name
    raise AssertionError(found.config)


def hidden(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


def report(capsys, what, counts):
    with capsys.disabled():
        print(f"\n{what}: {sum(counts.values())} kills: {dict(counts)}")


def test_at_every_line_of_the_writer(pair, make_base, tmp_path, capsys):
    old, new = pair
    base, counts = make_base(), collections.Counter()
    old.save_pretrained(tmp_path)
    lines = save_until(new, tmp_path, -1)
    assert lines > 50
    for kill in range(KILLS):
        old.save_pretrained(tmp_path)
        assert not hidden(tmp_path)
        line = lines - kill * lines // KILLS if lines > KILLS else lines - kill % lines
        assert wait(killed(lambda line=line: save_until(new, tmp_path, line)))
        counts[which(tmp_path, base, old, new)] += 1
    report(capsys, f"save_pretrained, at {min(lines, KILLS)} of {lines} lines", counts)
    assert set(counts) == {"old", "new"}


def test_at_any_time(pair, make_base, tmp_path, capsys):
    old, new = pair
    base, counts = make_base(), collections.Counter()

    def save_both():
        while True:
            new.save_pretrained(tmp_path)
            old.save_pretrained(tmp_path)

    for seed in range(KILLS):
        old.save_pretrained(tmp_path)
        pid = killed(save_both)
        time.sleep(0.01 + random.Random(seed).random() * 0.04)
        os.kill(pid, signal.SIGKILL)
        assert wait(pid)
        counts[which(tmp_path, base, old, new)] += 1
    old.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [TENSORS_FILE, CONFIG_FILE]
    report(capsys, "save_pretrained, at any time", counts)


@pytest.mark.parametrize("header", [True, False])
def test_between_the_renames(pair, make_base, tmp_path, monkeypatch, header):
    """Also over an adapter that an older version saved, whose tensors hold no header."""
    old, new = pair
    if not header:
        monkeypatch.setattr(checkpoints, "HEADER_KEY", "unused")
    old.save_pretrained(tmp_path)
    monkeypatch.undo()
    replace = os.replace

    def stop(source, target):
        replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    def save():
        monkeypatch.setattr(os, "replace", stop)
        new.save_pretrained(tmp_path)

    assert wait(killed(save))
    assert which(tmp_path, make_base(), old, new) == "new"
    assert len(hidden(tmp_path)) == 1
    new.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [TENSORS_FILE, CONFIG_FILE]
