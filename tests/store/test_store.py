"""Memory stores: entries come back mapped and complete, by key or by text, or a typed error names them."""

import gc
import os
import pickle
import random
import shutil
import threading
import uuid

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.store import K, count_compressed, file_of, make_origin, memory_for, slot_kv
from icae_fast import ICAEConfig, Memory, MemoryStore, Origin, errors
from icae_fast.store.memory_file import load_memory, read_memory_header
from icae_fast.store.provenance import source_hash

LOCAL, REMOTE = "local", "remote"


@pytest.fixture(params=[LOCAL, REMOTE])
def address(request, tmp_path):
    """A folder, and an address in fsspec's in-memory file system."""
    return tmp_path / "store" if request.param == LOCAL else f"memory://{uuid.uuid4().hex}/store"


def mapped(path):
    """Return how many times this process has a file mapped."""
    with open("/proc/self/maps") as maps:
        return sum(line.rstrip().endswith(str(path)) for line in maps)


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
    memory, alone = read_memory_header(file_of(store))  # an entry is an ordinary memory file
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
    calls = count_compressed(monkeypatch)
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
        assert torch.equal(second[1].slots, icae.compress([[7] * 40])[0].slots)
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
    icae.memory_token_embed.weight.data[0, 0] += 1  # does not change a version counter
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
    # This test is about memory, and 30,000 syncs take minutes on a slow disk.
    monkeypatch.setattr("icae_fast.io.files.os.fsync", lambda _: None)
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
