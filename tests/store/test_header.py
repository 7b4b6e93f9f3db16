"""Memory files with a right seal and a wrong content are refused before anything is made of them."""

import copy
import json
import pickle
import zlib

import pytest
import torch

from helpers.store import D, K, file_of, make_origin, memory_for, slot_kv
from icae_fast import Memory, MemoryStore, errors
from icae_fast.store.memory_file import MemoryFile, PackedMemory, read_memory_header
from icae_fast.store.seal import _MARK, METADATA


@pytest.fixture(scope="module")
def content():
    """The bytes of a sealed file with int8 slots, keys and values."""
    packed = PackedMemory.of(memory_for("a"), "int8")
    return bytes(packed.encode(make_origin(), kv=slot_kv(), key="a", source_hash="f" * 64))


def resealed(content, change):
    """Return a file with a changed header and the right checksum over it.

    Args:
        content: of the file.
        change: gets the header and the memory's fields, and changes them or returns the text of the fields.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    fields = json.loads(header["__metadata__"][METADATA])
    text = change(header, fields) or json.dumps(fields)
    header["__metadata__"][METADATA] = text
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    at = len(_MARK) + (len(head).to_bytes(8, "little") + head).index(_MARK)
    head = bytearray(len(head).to_bytes(8, "little") + head)
    head[at : at + 8] = b"0" * 8
    head[at : at + 8] = b"%08x" % zlib.crc32(bytes(head))
    return bytes(head) + content[end:]


def in_fields(**values):
    return lambda header, fields: fields.update(values)


def in_config(**values):
    return lambda header, fields: fields["config"].update(values)


def in_base(**values):
    return lambda header, fields: fields["base"].update(values)


def in_tensor(name, **values):
    return lambda header, fields: header[name].update(values)


DEEP = "[" * 100_000 + "]" * 100_000
BAD = {
    "shape": in_tensor("slots", shape=[2, 4 * D]), "flat": in_tensor("slots", shape=[2 * K * D]),
    "huge shape": in_tensor("slots", shape=[1 << 40, 1 << 40]), "negative": in_tensor("slots", shape=[-8, -16]),
    "fraction": in_tensor("slots", shape=[8.0, 16]), "dtype": in_tensor("slots", dtype="F16"),
    "unknown dtype": in_tensor("slots", dtype="I128"), "dtype list": in_tensor("slots", dtype=["I8"]),
    "offsets": in_tensor("slots", data_offsets=[0, 1 << 62]), "one offset": in_tensor("slots", data_offsets=[0]),
    "overlap": lambda header, fields: header.update(keys=header["values"]),
    "spec": lambda header, fields: header.update(slots=7), "gone": lambda header, fields: header.pop("slots") and None,
    "no scale": lambda header, fields: header.pop("slots_scale") and None,
    "memory size": in_config(memory_size=1 << 33), "no memory size": in_config(memory_size=None),
    "hidden size": in_base(hidden_size=1 << 40), "hidden size text": in_base(hidden_size="16"),
    "layers": in_base(num_hidden_layers=9), "version text": in_fields(format_version="2"),
    "version bool": in_fields(format_version=True), "version 0": in_fields(format_version=0),
    "spans": in_fields(span_lengths=[20]), "spans 0": in_fields(span_lengths=[20, 0]),
    "spans text": in_fields(span_lengths="ab"), "spans none": in_fields(span_lengths=[]),
    "spans huge": in_fields(span_lengths=[1 << 62, 20 - (1 << 62)]), "tokens": in_fields(n_source_tokens=21),
    "tokens list": in_fields(n_source_tokens=[20]), "slots dtype": in_fields(slots_dtype="save"),
    "slots dtype int8": in_fields(slots_dtype="int8"), "slots dtype list": in_fields(slots_dtype=["float32"]),
    "prefix": in_fields(kv_prefix_ids=None), "prefix text": in_fields(kv_prefix_ids="ab"),
    "prefix negative": in_fields(kv_prefix_ids=[-1]), "key": in_fields(key=7), "created": in_fields(created="now"),
    "created nan": in_fields(created=float("nan")), "source": in_fields(source_hash=[1]),
    "sums": in_fields(tensor_crc32={}), "sums list": in_fields(tensor_crc32=[]), "base": in_fields(base=[]),
    "config": in_fields(config=[]), "adapter": in_fields(adapter_hash=None),
    "digits": lambda header, fields: (
        json.dumps(fields).replace('"n_source_tokens": 20', f'"n_source_tokens": {"9" * 5000}')
    ),
    "deep": lambda header, fields: json.dumps(fields).replace('"key": "a"', f'"key": {DEEP}'),
    "no object": lambda header, fields: json.dumps(fields)[:-1],
}  # fmt: skip


def test_a_resealed_file_is_read(content):
    file = MemoryFile.read(blob_of(resealed(content, lambda header, fields: None)), "it")
    assert file.memory().n_slots == 2 * K
    assert torch.equal(file.kv().keys, slot_kv().keys)


def blob_of(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_header_that_contradicts_its_tensors(content, change):
    with pytest.raises(errors.CheckpointError, match=r"^it (is damaged|is no memory file)"):
        MemoryFile.read(blob_of(resealed(content, change)), "it")


@pytest.mark.parametrize("size", [0, 1 << 24, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_of_another_length(content, size, tmp_path):
    (tmp_path / "a.icae").write_bytes(size.to_bytes(8, "little") + content[8:])
    with pytest.raises(errors.CheckpointError, match=r"a\.icae"):
        read_memory_header(tmp_path / "a.icae")


def test_a_memory_that_no_reader_would_take_is_not_written(store):
    with pytest.raises(errors.InvalidInputError, match="spans have 20 tokens and the memory 21"):
        store.put("a", Memory(memory_for("a").slots, 21, (10, 10)))
    assert len(store) == 0


def test_no_more_of_a_remote_object_is_fetched_than_its_header_states():
    store = MemoryStore("memory://limits", make_origin())
    memory = memory_for("a", spans=3000)  # longer than the first request
    store.put("a", memory, kv=slot_kv(3000 * K))
    assert torch.equal(store.get("a").slots, memory.slots)
    folder = store._folder
    path, content = folder._path("a"), bytes(folder.fs.cat_file(folder._path("a")))
    assert len(content) > 1 << 20
    fetched = []
    fetch = folder.fs.cat_file
    folder.fs.cat_file = lambda path, start=None, end=None: fetched.append(end - start) or fetch(path, start, end)
    try:
        assert store.header("a")["n_source_tokens"] == 30_000
        assert sum(fetched) < len(content) / 2
        fetched.clear()
        fetch_all = content + bytes(20 << 20)
        folder.fs.pipe_file(path, fetch_all)
        with pytest.raises(errors.CheckpointError, match="bytes instead of"):
            store.get("a")
        assert sum(fetched) == len(content) + 1
    finally:
        del folder.fs.cat_file


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_memory_of_a_store_carries_its_own_bytes_alone(tmp_path, kind):
    address = tmp_path / "store" if kind == "local" else "memory://carried"
    with MemoryStore(address, make_origin()) as store:
        store.put("a", memory_for("a"), kv=slot_kv())
        memory, kv = store.get("a"), store.get_kv("a")
    for x in (memory.slots, kv.keys, kv.values):
        assert x.untyped_storage().nbytes() == x.nbytes
    assert len(pickle.dumps(memory)) < memory.nbytes + 1000
    assert torch.equal(pickle.loads(pickle.dumps(memory)).slots, memory_for("a").slots)
    assert copy.deepcopy(memory).slots.untyped_storage().nbytes() == memory.nbytes
    if kind == "local":
        raw = kv.keys.contiguous().view(torch.uint8).numpy().tobytes()
        assert raw[:64] in file_of(store).read_bytes() or kv.keys.is_contiguous() is False
        assert raw[:32] not in pickle.dumps(memory)
