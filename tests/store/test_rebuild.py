"""`MemoryStore.rebuild` that is cut off at any line loses nothing."""

import os
import shutil
import signal
import sqlite3

import pytest
import torch

from helpers.faults.cuts import Cut, count_lines, cut_off, killed
from helpers.store import make_origin, memory_for
from icae_fast import MemoryStore, errors
from icae_fast.store.index_files import INDEX_FILE

WRITERS = ("store", "io/files.py")
KEYS = [f"k{i}" for i in range(3)]


def left_by_a_killed_writer(root):
    """Make a store whose rows are in the log alone."""
    if (child := os.fork()) == 0:
        try:
            store = MemoryStore(root, make_origin())
            for key in KEYS:
                store.put(key, memory_for(key))
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)


def damage(root):
    index = root / INDEX_FILE
    index.write_bytes(b"\xff" * 200 + index.read_bytes()[200:])


STATES = {"intact": lambda _: None, "damaged": damage, "lost": lambda root: (root / INDEX_FILE).unlink()}


@pytest.fixture(params=STATES)
def cut(request, tmp_path):
    """Return `cut(make_cut, at)`, which cuts a rebuild off, checks that nothing is lost, and returns if it was cut."""
    original = tmp_path / "original"
    left_by_a_killed_writer(original)
    STATES[request.param](original)

    def call(make_cut, at):
        root = tmp_path / "store"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original, root)
        found = make_cut(lambda: MemoryStore.rebuild(root), at)
        check(root)
        return found

    return call


def check(root):
    """Assert that the store has all its entries, or says that it needs `rebuild` and has them after it."""
    try:
        with MemoryStore(root, make_origin()) as store:
            found = list(store)
            store.clean(older_than=-1)
    except errors.StoreError as error:
        found = KEYS if "MemoryStore.rebuild" in str(error) else str(error)
    assert found == KEYS
    assert MemoryStore.rebuild(root) == []
    with MemoryStore(root, make_origin()) as store:
        assert list(store) == KEYS
        for key in KEYS:
            assert torch.equal(store.get(key).slots, memory_for(key).slots)
    assert not [p.name for p in root.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("error", [Cut(), OSError(28, "No space left"), sqlite3.OperationalError("x is full")])
def test_a_rebuild_that_fails_at_any_call_loses_nothing(cut, error):
    at, cuts = 1, 0
    while cut(lambda work, at: cut_off(work, at, error), at):
        cuts, at = cuts + 1, at + 1
    assert cuts > 15


def test_a_rebuild_killed_at_any_line_loses_nothing(cut):
    at, kills = 1, 0
    while cut(lambda work, at: killed(work, WRITERS, at), at):
        kills, at = kills + 1, at + 11
    assert kills > 15


def test_the_log_of_an_old_index_is_not_applied_to_a_new_one(tmp_path):
    left_by_a_killed_writer(tmp_path)
    log = (tmp_path / f"{INDEX_FILE}-wal").read_bytes()
    shutil.rmtree(tmp_path)
    with MemoryStore(tmp_path) as store:
        assert len(store) == 0
    (tmp_path / INDEX_FILE).unlink()
    (tmp_path / f"{INDEX_FILE}-wal").write_bytes(log)
    with MemoryStore(tmp_path) as store:
        assert list(store) == []
    assert count_lines(lambda: MemoryStore.rebuild(tmp_path), WRITERS) > 20


@pytest.mark.parametrize("kind", ["foreign", "newer"])
def test_an_index_that_is_not_ours_is_not_replaced(tmp_path, kind):
    MemoryStore(tmp_path).close()
    index = tmp_path / INDEX_FILE
    with sqlite3.connect(index) as connection:
        connection.execute("PRAGMA user_version = 9" if kind == "newer" else "PRAGMA application_id = 1")
    connection.close()
    content = index.read_bytes()
    with pytest.raises(errors.StoreError, match="newer icae-fast" if kind == "newer" else "no index of a memory"):
        MemoryStore.rebuild(tmp_path)
    assert index.read_bytes() == content
