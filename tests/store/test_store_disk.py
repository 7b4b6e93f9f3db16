"""Stores on a full disk, and on one that can only be read."""

import sqlite3

import pytest

from helpers.faults.mounts import run_on_small_disk
from helpers.store import make_origin, memory_for
from icae_fast import MemoryStore, errors
from icae_fast.store.index_files import INDEX_FILE

_BEGIN = """
import os, signal, subprocess, sys
from pathlib import Path
from helpers.store import make_origin, memory_for
from icae_fast import MemoryStore, errors
disk = Path(sys.argv[1])
root = disk / "store"

def fill():
    with open(disk / "fill", "ab", 0) as file:
        for size in (65536, 4096, 1):
            try:
                while True: file.write(b"x" * size)
            except OSError:
                pass

def put(store, *keys):
    for key in keys: store.put(key, memory_for(key))

def check(store, *keys):
    assert sorted(store) == sorted(keys), sorted(store)
    assert len(store) == len(keys)
    for key in keys: assert store.get(key).slots.equal(memory_for(key).slots)
"""


@pytest.mark.parametrize("opened", ["before", "after"])
def test_delete_and_clean_work_on_a_full_disk(tmp_path, opened):
    code = f"""
store = MemoryStore(root, make_origin())
keys = [f"k{{i}}" for i in range(200)]
put(store, *keys)
if {opened == "after"}: store.close()
folder = next(p for p in root.iterdir() if len(p.name) == 2 and p.is_dir())
name = f"{{folder.name}}{{'0' * 30}}-{{'0' * 16}}.safetensors"
(folder / name).write_bytes(b"x" * 5000)
fill()
try: put(store, *(f"more-{{i}}" for i in range(50)))
except errors.StoreError as error: assert "free space" in str(error) and "rebuild" not in str(error), error
else: raise AssertionError("the disk is not full")
fill()
assert store.delete("k0") and "k0" not in store
fill()
assert store.clean(older_than=-1) >= 1 and not (folder / name).exists()
for key in keys[1:150]:
    fill()
    assert store.delete(key), key
left = [k for k in store if k.startswith("k")]
assert len(left) == 50
check(store, *left, *(k for k in store if k.startswith("more")))
store.close()
"""
    run_on_small_disk(tmp_path / "disk", _BEGIN + code)


def test_a_full_disk_is_no_damage(store):
    """The sentence about a full disk does not recommend `rebuild`, which would not help."""
    store.put("a", memory_for("a"))
    with store._folder.index._connected() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")

    def put_many():
        for i in range(1000):
            store.put(f"{i:0200}", memory_for("a"))

    with pytest.raises(errors.StoreError, match=r"is full; free space") as caught:
        put_many()
    assert "rebuild" not in str(caught.value)
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)


@pytest.mark.parametrize("left", ["nothing", "log", "log without shared memory"])
def test_a_store_on_a_read_only_disk_can_be_read(tmp_path, left):
    code = f"""
with MemoryStore(root, make_origin()) as store: put(store, "a", "b")
if {left != "nothing"}:  # a killed writer, whose rows are in the log
    if (child := os.fork()) == 0:
        put(MemoryStore(root, make_origin()), "c", "d")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (root / "index.sqlite-wal").stat().st_size
if {left == "log without shared memory"}: (root / "index.sqlite-shm").unlink()
keys = ["a", "b"] + ["c", "d"] * {left != "nothing"}
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
with MemoryStore(root, make_origin()) as store:
    check(store, *keys)
    for write in (lambda: put(store, "e"), lambda: store.delete("a"), lambda: MemoryStore.rebuild(root)):
        try: write()
        except errors.StoreError as error: assert "rebuild(" not in str(error), error
        else: raise AssertionError("written")
    assert store.clean(0) == 0
    check(store, *keys)
"""
    run_on_small_disk(tmp_path / "disk", _BEGIN + code)


def test_a_reader_of_a_read_only_mount_sees_what_a_writer_puts(tmp_path):
    code = """
view = disk / "view"
view.mkdir()
writer = MemoryStore(root, make_origin())
put(writer, "a")
subprocess.run(["mount", "--bind", root, view], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", view], check=True)
reader = MemoryStore(view)
check(reader, "a")
put(writer, "b")
check(reader, "a", "b")
writer.close()
check(reader, "a", "b")
with MemoryStore(root, make_origin()) as again:
    put(again, "c")
    check(reader, "a", "b", "c")
    again.delete("a")
check(reader, "b", "c")
"""
    run_on_small_disk(tmp_path / "disk", _BEGIN + code)


def test_a_read_only_store_says_so(tmp_path, monkeypatch):
    MemoryStore(tmp_path, make_origin()).close()
    monkeypatch.setattr("icae_fast.store.index.is_writable", lambda _: False)
    with MemoryStore(tmp_path, make_origin()) as store:
        assert list(store) == []
        with pytest.raises(errors.StoreError, match=rf"{INDEX_FILE} cannot be written; check the permissions"):
            store.put("a", memory_for("a"))
