"""Memory stores with damaged files or index, a full disk, or waste files."""

import os
import random
import sqlite3
import uuid

import pytest
import torch

from helpers.store import D, K, file_of, make_origin, memory_for, slot_kv
from icae_fast import Memory, MemoryStore, errors
from icae_fast.store.index_files import INDEX_FILE
from icae_fast.store.memory_file import read_memory_header


def test_every_flipped_byte_and_every_cut_is_found(tmp_path):
    with MemoryStore(tmp_path / "store", make_origin(), dtype="int8") as store:
        store.put("doc", Memory(torch.randn(K, D), 5, (5,)), kv=slot_kv(K))
        path = file_of(store)
        content = path.read_bytes()

        def damaged(data):
            path.write_bytes(data)
            with pytest.raises(errors.CheckpointError, match="entry 'doc' of the store") as caught:
                store.get("doc"), store.get_kv("doc")
            return str(caught.value)

        header = 8 + int.from_bytes(content[:8], "little")
        found = set()
        for i in range(len(content)):
            for flip in (0x01, 0x80, 0x29):  # the last turns a space into a tab, which JSON accepts
                message = damaged(content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :])
            found.add(message.split(": ")[-1].split(";")[0] if i >= header else "header")
        wrong = {f"the checksum of its {n} is wrong" for n in ("slots", "slots_scale", "keys", "values")}
        assert found == wrong | {"header"}
        for size in [0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1]:
            damaged(content[:size])
        damaged(content + b"\0")
        damaged(random.Random(0).randbytes(len(content)))
        path.unlink()
        with pytest.raises(errors.CheckpointError, match=r"entry 'doc' .* is missing"):
            store.get("doc")
        path.write_bytes(content)
        assert store.get("doc").n_slots == K
        assert MemoryStore(tmp_path / "store", verify=False).get("doc").n_slots == K


def test_a_damaged_remote_entry():
    store = MemoryStore(f"memory://{uuid.uuid4().hex}", make_origin())
    store.put("doc", memory_for("doc"))
    path = store._folder._path("doc")
    content = store._folder.fs.cat_file(path)
    for data in (b"", content[:50], content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        store._folder.fs.pipe_file(path, data)
        with pytest.raises(errors.CheckpointError, match="entry 'doc' of the store memory:"):
            store.get("doc")


def test_a_file_in_the_place_of_another(store):
    store.put("a", memory_for("a"))
    first = file_of(store)
    content = first.read_bytes()
    store.delete("a")
    store.put("b", memory_for("b"))
    file_of(store).write_bytes(content)
    with pytest.raises(errors.CheckpointError, match=r"entry 'b' .* holds another entry, 'a'"):
        store.get("b")


def test_a_damaged_index_is_reported_and_made_again(store, tmp_path):
    for key in "abc":
        store.put(key, memory_for(key))
    store.put("a", memory_for("new"))
    store.close()
    root = tmp_path / "store"
    index = root / INDEX_FILE
    content = index.read_bytes()
    damaged = next(root.glob("??/*.safetensors"))
    gone = [k for k in "abc" if read_memory_header(damaged)[1]["key"] == k]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for data in (b"", b"hello" * 1000, content[:100] + b"\xff" * 4000 + content[4100:], content[:5000]):
        index.write_bytes(data)
        with pytest.raises(errors.StoreError, match=INDEX_FILE):
            MemoryStore(root, make_origin()).get("b"), MemoryStore(root).keys().__next__()
    index.unlink()
    with pytest.raises(errors.StoreError, match=r"no index.sqlite; make it again with MemoryStore.rebuild"):
        MemoryStore(root, make_origin())
    index.write_bytes(content[:5000])
    assert MemoryStore.rebuild(root) == [str(damaged.relative_to(root))]
    with MemoryStore(root, make_origin()) as again:
        left = [k for k in "abc" if k not in gone]
        assert list(again) == left
        for key in left:
            assert torch.equal(again.get(key).slots, memory_for("new" if key == "a" else key).slots)


def test_a_newer_or_foreign_index_is_refused(store, tmp_path):
    store.close()
    for pragma, message in (("user_version = 9", "install a newer"), ("application_id = 1", "no index of a memory")):
        with sqlite3.connect(tmp_path / "store" / INDEX_FILE) as connection:
            connection.execute(f"PRAGMA {pragma}")
        connection.close()
        with pytest.raises(errors.StoreError, match=message):
            MemoryStore(tmp_path / "store")


def test_a_put_that_fails_leaves_the_old_entry(store, monkeypatch):
    store.put("a", memory_for("a"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("icae_fast.io.files.os.fsync", full)
    with pytest.raises(errors.StoreError, match="No space left"):
        store.put("a", memory_for("b"))
    monkeypatch.undo()
    assert torch.equal(store.get("a").slots, memory_for("a").slots)
    assert len(list(store._folder.root.glob("??/*"))) == 1


def test_waste_is_cleaned_and_entries_are_not(store):
    store.put("a", memory_for("a"))
    path = file_of(store)
    digest, folder = path.name[:32], path.parent
    waste = f"{digest}-{'0' * 16}.safetensors"
    for name in (waste, f".{waste}.{'1' * 32}"):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (1e9, 1e9))
    os.utime(path, (1e9, 1e9))
    young = f"{digest}-{'2' * 16}.safetensors"
    (folder / young).write_bytes(b"x")
    index = folder.parent / f".{INDEX_FILE}.{'3' * 32}"
    index.write_bytes(b"x")
    os.utime(index, (1e9, 1e9))
    assert store.clean() == 3
    assert sorted(p.name for p in folder.iterdir()) == sorted([path.name, young])
    assert not index.exists()
    assert torch.equal(store.get("a").slots, memory_for("a").slots)
