"""A store reads, replaces and deletes files of its own names in its own folder, whatever index and folder hold."""

import os
import sqlite3
import uuid
from contextlib import closing

import pytest
import torch

from helpers.store import file_of, make_origin, memory_for
from icae_fast import MemoryStore, errors
from icae_fast.store.index_files import INDEX_FILE


@pytest.fixture
def victim(tmp_path):
    """A file beside the store."""
    path = tmp_path / "victim.safetensors"
    path.write_text("precious")
    return path


def change_index(root, statement, *values):
    with closing(sqlite3.connect(root / INDEX_FILE, isolation_level=None)) as connection:
        connection.execute(statement, values)


def entry_of(store, key):
    return store._folder.root / store._folder.index.file_of(key)


@pytest.mark.parametrize("kind", ["above", "absolute", "inside", "blob", "of another key"])
def test_a_row_that_names_a_file_of_somebody_else(store, victim, kind):
    root = store._folder.root
    store.put("k", memory_for("k"))
    store.put("other", memory_for("other"))
    other = entry_of(store, "other")
    file = {
        "above": "../victim.safetensors", "absolute": str(victim), "inside": "ab/../../victim.safetensors",
        "blob": b"../victim.safetensors", "of another key": other.relative_to(root).as_posix(),
    }[kind]  # fmt: skip
    if kind == "of another key":
        change_index(root, "DELETE FROM entries WHERE key = 'other'")
    for use in ("read", "put", "delete"):
        change_index(root, "REPLACE INTO entries VALUES ('k', ?)", file)
        if use == "read":
            for read in (store.get, store.header, store.get_kv):
                with pytest.raises(errors.CheckpointError, match=r"entry 'k' .* is no file of this entry"):
                    read("k")
        elif use == "put":
            store.put("k", memory_for("k"))
            assert torch.equal(store.get("k").slots, memory_for("k").slots)
        else:
            assert store.delete("k")
            assert "k" not in store
        assert victim.read_text() == "precious"
        assert other.exists()


def test_clean_and_rebuild_touch_only_files_of_the_store(store, tmp_path):
    root = store._folder.root
    store.put("a", memory_for("a"))
    path, folder = file_of(store), file_of(store).parent
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    linked = next(n for n in ("00", "11") if n != folder.name)
    (root / linked).symlink_to(elsewhere)
    name = f"{path.name[:32]}-{'0' * 16}.safetensors"
    strangers = [
        elsewhere / f"{linked}{'0' * 30}-{'0' * 16}.safetensors", folder / "notes.txt", folder / "model.safetensors",
        folder / f"{name}.bak", folder / f"{'f' * 32}-{'0' * 16}.safetensors", root / "model.safetensors",
        root / "index.sqlite.backup", root / ".index.sqlite.mine",
    ]  # fmt: skip
    strangers = [p for p in strangers if p.name[:2] != folder.name or p.name == f"{name}.bak"]
    for stranger in strangers:
        stranger.write_text("precious")
    target = tmp_path / "target"
    target.write_text("precious")
    (folder / name).symlink_to(target)
    (folder / f"{path.name[:32]}-{'1' * 16}.safetensors").mkdir()
    assert store.clean(older_than=-1) == 0
    store.close()
    assert MemoryStore.rebuild(root) == []
    assert list(store) == ["a"]
    assert all(p.read_text() == "precious" for p in (*strangers, target))


def test_links_are_not_followed(store, tmp_path):
    root = store._folder.root
    store.put("a", memory_for("a"))
    path = file_of(store)
    copy = tmp_path / "copy"
    path.rename(copy)
    path.symlink_to(copy)
    with pytest.raises(errors.CheckpointError, match=r"entry 'a' .* cannot be read"):
        store.get("a")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(errors.CheckpointError, match="no regular file"):
        store.get("a")
    path.unlink()
    elsewhere = tmp_path / "elsewhere"
    path.parent.rmdir()
    elsewhere.mkdir()
    (elsewhere / path.name).write_bytes(copy.read_bytes())
    path.parent.symlink_to(elsewhere)
    with pytest.raises(errors.CheckpointError, match="is a link"):
        store.get("a")
    with pytest.raises(errors.StoreError, match="is a link"):
        store.put("a", memory_for("b"))
    assert store.delete("a")
    assert [p.name for p in elsewhere.iterdir()] == [path.name]
    store.close()
    (root / INDEX_FILE).rename(tmp_path / "index")
    (root / INDEX_FILE).symlink_to(tmp_path / "index")
    with pytest.raises(errors.StoreError, match="is a link, which a store does not follow"):
        MemoryStore(root)


def test_the_folder_of_a_store_may_be_a_link(store, tmp_path):
    (tmp_path / "link").symlink_to(store._folder.root)
    with MemoryStore(tmp_path / "link", make_origin()) as linked:
        linked.put("a", memory_for("a"))
        assert torch.equal(linked.get("a").slots, memory_for("a").slots)
    assert torch.equal(store.get("a").slots, memory_for("a").slots)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER evil AFTER DELETE ON entries BEGIN DELETE FROM entries; END",
        "CREATE VIEW more AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
    ],
)
def test_an_index_with_a_program_is_made_again(store, statement):
    root = store._folder.root
    store.put("a", memory_for("a"))
    store.put("b", memory_for("b"))
    store.close()
    change_index(root, statement)
    with pytest.raises(errors.StoreError, match=r"other tables than a store makes; make it again"):
        MemoryStore(root)
    assert MemoryStore.rebuild(root) == []
    with MemoryStore(root, make_origin()) as again:
        assert again.delete("a")
        assert list(again) == ["b"]


def test_only_objects_with_names_of_the_store_are_remote_keys():
    store = MemoryStore(f"memory://{uuid.uuid4().hex}", make_origin())
    keys = ["a", "..", ".", "../victim", "a/b", "%2e", "ü"]
    for key in keys:
        store.put(key, memory_for(key))
    fs, root = store._folder.fs, store._folder.root
    for name in ("%61.safetensors", "a b.safetensors", "%ff.safetensors", "notes.txt", ".safetensors"):
        fs.pipe_file(f"{root}/{name}", b"x")
    fs.makedirs(f"{root}/folder.safetensors", exist_ok=True)
    fs.pipe_file(f"{root}/folder.safetensors/x", b"x")
    assert list(store) == sorted(keys)
    for key in keys:
        assert torch.equal(store.get(key).slots, memory_for(key).slots)
        assert store.delete(key)
    assert fs.exists(f"{root}/notes.txt")
