"""Memory stores: what is put comes back mapped and whole, by its key or by its text, or a typed error names it."""

import gc
import os
import pickle
import random
import shutil
import sqlite3
import threading
import uuid

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icae_fast import ICAEConfig, Memory, MemoryStore, Origin, SlotKV, errors
from icae_fast.memory_file import load_memory, read_memory_header
from icae_fast.origin import source_hash
from icae_fast.store_local import INDEX_FILE
from store_worker import D, K, make_origin, memory_for

LOCAL, REMOTE = "local", "remote"


@pytest.fixture(params=[LOCAL, REMOTE])
def address(request, tmp_path):
    """A folder, and an address in fsspec's store in memory."""
    return tmp_path / "store" if request.param == LOCAL else f"memory://{uuid.uuid4().hex}/store"


@pytest.fixture
def store(tmp_path):
    """An empty local store without a model, k = 4 and d = 16."""
    with MemoryStore(tmp_path / "store", make_origin()) as opened:
        yield opened


def file_of(store):
    """The file of the only entry of a local store."""
    (path,) = store._folder.root.glob("??/*.safetensors")
    return path


def mapped(path):
    """How often this process has a file mapped."""
    with open("/proc/self/maps") as maps:
        return sum(line.rstrip().endswith(str(path)) for line in maps)


def slot_kv(n_slots=2 * K, prefix=(5, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, n_slots, 2, 8, generator=generator).bfloat16()
    return SlotKV(keys, values, prefix)


def test_put_get_replace_delete(address):
    store = MemoryStore(address, make_origin())
    assert (len(store), list(store)) == (0, [])
    keys = ["a", "b/c d", "../ü\u4e2d%2F.", "a" * 200]
    for key in keys:
        store.put(key, memory_for(key))
    with pytest.raises(errors.MemoryNotFoundError, match="no entry 'z'; see its keys"):
        store.get("z")
    assert list(store.keys()) == sorted(keys)
    assert len(store) == 4
    assert all(key in store for key in keys)
    assert "z" not in store
    assert 7 not in store
    for key in keys:
        memory = store.get(key)
        assert torch.equal(memory.slots, memory_for(key).slots)
        assert (memory.n_source_tokens, memory.span_lengths) == (20, (10, 10))
    old = store.get("a")
    store.put("a", memory_for("other", spans=3))
    assert torch.equal(store.get("a").slots, memory_for("other", spans=3).slots)
    assert torch.equal(old.slots, memory_for("a").slots)
    assert len(store) == 4
    assert store.delete("a")
    assert not store.delete("a")
    assert "a" not in store
    store.close()
    again = MemoryStore(address, create=False)
    assert list(again) == sorted(keys[1:])
    assert torch.equal(again.get("b/c d").slots, memory_for("b/c d").slots)


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6), st.sampled_from(["local", "remote"]))
def test_any_text_is_a_key(tmp_path_factory, keys, kind):
    folder = tmp_path_factory.mktemp("keys") if kind == LOCAL else f"memory://{uuid.uuid4().hex}"
    with MemoryStore(folder, make_origin()) as store:
        for key in keys:
            if any("\ud800" <= c <= "\udfff" for c in key):
                with pytest.raises(errors.InvalidInputError, match="is no key"):
                    store.put(key, memory_for("x"))
                return
            store.put(key, memory_for(key.encode().hex()))
        assert set(store.keys()) == set(keys)
        for key in keys:
            assert torch.equal(store.get(key).slots, memory_for(key.encode().hex()).slots)


def test_get_maps_the_file_and_a_write_stays_in_the_process(store):
    store.put("a", memory_for("a"), kv=slot_kv())
    path = file_of(store)
    content = path.read_bytes()
    memory = store.get("a")
    assert mapped(path) == 1
    kv = store.get_kv("a")
    assert mapped(path) == 2
    open_files = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert str(path) not in open_files
    memory.slots.zero_()
    kv.keys.zero_()
    assert path.read_bytes() == content
    assert torch.equal(store.get("a").slots, memory_for("a").slots)
    del memory, kv
    gc.collect()
    assert mapped(path) == 0


def test_the_file_says_what_made_it(store):
    store.put("a", memory_for("a"), source_hash="f" * 64)
    header = store.header("a")
    assert header["format_version"] == 2
    assert header["base"] == make_origin().base
    assert header["adapter_hash"] == make_origin().adapter_hash
    assert (header["config"]["memory_size"], header["config"]["compression_rate"]) == (K, 4)
    assert {"base_model", "base_revision"} <= set(header["config"])
    assert header["span_lengths"] == [10, 10]
    assert (header["key"], header["source_hash"], header["slots_dtype"]) == ("a", "f" * 64, "bfloat16")
    memory, alone = read_memory_header(file_of(store))  # an entry is a memory file like any other
    assert alone == header
    assert torch.equal(memory.slots, memory_for("a").slots)


def test_keys_and_values_belong_to_a_prefix(address):
    store = MemoryStore(address, make_origin(), dtype="int8")
    kv = slot_kv()
    store.put("a", memory_for("a"), kv=kv)
    store.put("b", memory_for("b"))
    found = store.get_kv("a", [5, 6])
    assert torch.equal(found.keys, kv.keys)
    assert torch.equal(found.values, kv.values)
    assert (found.prefix_ids, found.start) == ((5, 6), 2)
    assert torch.equal(store.get_kv("a").keys, kv.keys)
    assert store.get_kv("a", [5]) is None
    assert store.get_kv("b") is None
    with pytest.raises(errors.MemoryNotFoundError):
        store.get_kv("c")
    with pytest.raises(errors.InvalidInputError, match=r"keys are \(2, 4, 2, 8\)"):
        store.put("c", memory_for("c"), kv=slot_kv(n_slots=4))
    assert "c" not in store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_slots_are_near_and_small(tmp_path, dtype):
    memory = memory_for("a", spans=50).to(dtype)
    with MemoryStore(tmp_path / "a", make_origin(), dtype="int8") as store:
        store.put("a", memory)
        loaded = store.get("a")
    assert loaded.slots.dtype == dtype
    step = memory.slots.float().abs().amax(dim=1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * memory.slots.float().abs()
    assert ((loaded.slots.float() - memory.slots.float()).abs() <= 0.501 * step + rounding).all()
    assert read_memory_header(file_of(store))[1]["slots_dtype"] == str(dtype).removeprefix("torch.")


def test_bfloat16_slots_of_a_float32_model(tmp_path, tiny_icae, random_ids):
    memory = tiny_icae.compress(random_ids(20))[0]
    with MemoryStore(tmp_path / "a", tiny_icae, dtype="bfloat16") as store:
        store.put("a", memory)
        assert store.get("a").slots.dtype == torch.float32
        assert torch.equal(store.get("a").slots, memory.slots.bfloat16().float())
    assert MemoryStore(tmp_path / "a").get("a").slots.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_the_same_text_is_compressed_once(tmp_path, make_icae, make_tokenizer, monkeypatch, dtype):
    icae = make_icae(tokenizer=make_tokenizer())
    calls = []
    compress = icae.compress
    monkeypatch.setattr(icae, "compress", lambda rows, **o: calls.append(len(rows)) or compress(rows, **o))
    store = MemoryStore(tmp_path / "store", icae, dtype=dtype)
    first = store.compress(["w3 w4 w5", [7] * 40, "w3 w4 w5"])
    assert calls == [2]
    assert first[0].slots is first[2].slots
    second = store.compress([torch.tensor([3, 4, 5]), torch.full((40,), 7), [9]])
    assert calls == [2, 1]
    for a, b in zip(first[:2], second[:2], strict=True):
        assert torch.equal(a.slots, b.slots)
        assert (a.n_source_tokens, a.span_lengths) == (b.n_source_tokens, b.span_lengths)
        assert a.slots.dtype == b.slots.dtype == icae.dtype
    if dtype is None:
        assert torch.equal(second[1].slots, compress([[7] * 40])[0].slots)
    assert store.compress("w3 w4 w5")[0].n_source_tokens == 3
    assert calls == [2, 1]
    key = store.key_of("w3 w4 w5")
    assert key in store
    assert store.header(key)["source_hash"] == source_hash(torch.tensor([3, 4, 5]))
    assert len(store) == 3


def test_another_config_dtype_or_adapter_is_another_text(tmp_path, make_icae, make_base):
    icae = make_icae()
    key = MemoryStore(tmp_path, icae).key_of([3, 4])
    assert MemoryStore(tmp_path, make_icae()).key_of([3, 4]) == key
    assert MemoryStore(tmp_path, make_icae(base_model="elsewhere", prompt_format="plain")).key_of([3, 4]) == key
    others = [make_icae(compression_rate=2), make_icae(seed=3), make_icae(memory_positions="spread")]
    others += [make_icae(base=make_base(seed=0).double()), make_icae(lora_alpha=5.0)]
    assert key not in {MemoryStore(tmp_path, other).key_of([3, 4]) for other in others}
    store = MemoryStore(tmp_path, icae)
    icae.memory_token_embed.weight.data[0, 0] += 1  # leaves no trace in a version counter
    assert store.key_of([3, 4]) != key


def test_entries_of_another_model_or_adapter_are_refused(tmp_path, make_icae, random_ids):
    icae = make_icae()
    store = MemoryStore(tmp_path / "store", icae)
    memory = icae.compress(random_ids(20))[0]
    store.put("mine", memory)
    path = file_of(store)
    assert torch.equal(load_memory(path, icae).slots, memory.slots)
    for other, message in ((make_icae(seed=5), "other weights"), (make_icae("qwen3"), "model_type")):
        with pytest.raises(errors.BaseModelMismatchError, match=f"entry 'mine' of the store .*{message}"):
            MemoryStore(tmp_path / "store", other).get("mine")
    origin = Origin.of(icae)
    assert torch.equal(MemoryStore(tmp_path / "store", origin).get("mine").slots, memory.slots)
    with torch.no_grad():
        icae.memory_token_embed.weight[0, 0] += 1
    for call in (store.get, store.get_kv):
        with pytest.raises(errors.BaseModelMismatchError, match=r"entry 'mine' .* another adapter"):
            call("mine")
    assert store.header("mine")["adapter_hash"] == origin.adapter_hash
    assert torch.equal(MemoryStore(tmp_path / "store").get("mine").slots, memory.slots)


def test_bad_input_stores_nothing(store, tmp_path):
    good = memory_for("a")
    nan = Memory(good.slots.clone().fill_(float("nan")), 20, (10, 10))
    for key, memory, error in [
        ("", good, errors.InvalidInputError), (7, good, errors.InvalidInputError),
        ("a", good.slots, errors.InvalidInputError),
        ("a", Memory(good.slots[:5], 20, (10, 10)), errors.InvalidInputError), ("a", nan, errors.NonFiniteError),
    ]:  # fmt: skip
        with pytest.raises(error):
            store.put(key, memory)
    assert len(store) == 0
    reading = MemoryStore(tmp_path / "store")
    with pytest.raises(errors.InvalidInputError, match="without a model"):
        reading.put("a", good)
    for call in (store.compress, store.key_of, reading.compress):
        with pytest.raises(errors.InvalidInputError, match="without an ICAE"):
            call([3, 4])
    with pytest.raises(errors.InvalidInputError, match="pass the ICAE"):
        MemoryStore(tmp_path / "store", "int8")
    with pytest.raises(errors.InvalidInputError, match="'int8'"):
        MemoryStore(tmp_path / "store", dtype="float8")
    with pytest.raises(errors.StoreError, match="no memory store in"):
        MemoryStore(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StoreError, match="cannot make a memory store"):
        MemoryStore(tmp_path / "file")
    with pytest.raises(errors.StoreError, match="cannot be opened"):
        MemoryStore("nonsense://store")
    with pytest.raises(errors.InvalidInputError, match="use a shorter one"):
        MemoryStore("memory://short", make_origin()).put("ü" * 200, good)


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
            for flip in (0x01, 0x80, 0x29):  # the last makes a space a tab, which JSON would not mind
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

    monkeypatch.setattr("icae_fast.files.os.fsync", full)
    with pytest.raises(errors.StoreError, match="No space left"):
        store.put("a", memory_for("b"))
    monkeypatch.undo()
    assert torch.equal(store.get("a").slots, memory_for("a").slots)
    assert len(list(store._folder.root.glob("??/*"))) == 1


def test_waste_is_cleaned_and_entries_are_not(store):
    store.put("a", memory_for("a"))
    path = file_of(store)
    for name in ("left-without-a-row.safetensors", ".half-written.0123"):
        (path.parent / name).write_bytes(b"x")
        os.utime(path.parent / name, (1e9, 1e9))
    os.utime(path, (1e9, 1e9))
    (path.parent / "young").write_bytes(b"x")
    assert store.clean() == 2
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "young"])
    assert torch.equal(store.get("a").slots, memory_for("a").slots)


def test_threads_and_pickles_share_a_store(store):
    failures = []

    def work(n, own):
        try:
            for i in range(20):
                own.put(f"{n}-{i}", memory_for(f"{n}-{i}"))
                assert torch.equal(own.get(f"{n}-{i}").slots, memory_for(f"{n}-{i}").slots)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n, s)) for n, s in enumerate([store] * 3 + [pickle.loads(pickle.dumps(store))])]  # noqa: E501  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store) == 80


def test_ten_thousand_memories_in_constant_memory(tmp_path, monkeypatch):
    # What is tested is memory, and 30,000 syncs take minutes on a slow disk.
    monkeypatch.setattr("icae_fast.files.os.fsync", lambda _: None)
    n, data = 10_000, 10_000 * 64 * 64 * 2
    origin = Origin({"hidden_size": 64}, "0" * 16, ICAEConfig(memory_size=64, compression_rate=4))
    slots = torch.zeros(64, 64, dtype=torch.bfloat16)
    resident = psutil.Process().memory_info
    order = random.Random(0).sample(range(n), n)
    with MemoryStore(tmp_path / "store", origin) as store:
        store._folder.index._connection.execute("PRAGMA synchronous = OFF")
        writing, reading = [], []
        for i in range(n):
            store.put(str(i), Memory(slots + i % 128, 50, (50,)))
            if i % 1000 == 999:
                writing.append(resident().rss)
        for place, i in enumerate(order):
            assert bool((store.get(str(i)).slots == i % 128).all())
            if place % 1000 == 999:
                reading.append(resident().rss)
        assert len(store) == n
    for used in (writing, reading):
        assert max(used) - used[0] < data / 8  # 10 of 78 MiB
    shutil.rmtree(tmp_path / "store")
