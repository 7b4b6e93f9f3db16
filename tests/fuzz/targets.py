"""The parsers of outside bytes, each as a function of arbitrary bytes.

A target may return, or raise an `ICAEError`; anything else is a fault. A target writes only into the folder that it is
passed, which is empty when it is called.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from fuzz import seeds
from icae_fast.config import ICAEConfig
from icae_fast.errors import ICAEError
from icae_fast.io.checkpoints import (
    CONFIG_FILE,
    HEADER_KEY,
    TENSORS_FILE,
    infer_sizes,
    read_adapter,
    read_header,
    split_reference_tensors,
)  # fmt: skip
from icae_fast.io.files import tensor_bytes
from icae_fast.io.peft_folder import PEFT_CONFIG_FILE, PEFT_TENSORS_FILE, read_peft_adapter
from icae_fast.io.reference_files import read_reference_file
from icae_fast.store.index_files import INDEX_FILE, install_index
from icae_fast.store.local import LocalFolder
from icae_fast.store.memory_file import read_memory_header
from icae_fast.store.seal import _MARK

Target = Callable[[bytes, Path], None]
TARGETS: dict[str, Target] = {}


def target(function: Target) -> Target:
    """Add a function to `TARGETS` under its name."""
    TARGETS[function.__name__] = function
    return function


def check(name: str, data: bytes, folder: Path) -> None:
    """Run a target and accept the errors that it may raise."""
    with suppress(ICAEError):
        TARGETS[name](data, folder)


@target
def memory(data: bytes, folder: Path) -> None:
    """Read a memory file. An odd first byte has its checksum made right, so that mutations reach what lies behind."""
    body = data[1:]
    path = folder / "m.icae"
    path.write_bytes(with_right_checksum(body) if data[:1] and data[0] % 2 else body)
    found, header = read_memory_header(path)
    assert found.slots.dim() == 2
    assert isinstance(header, dict)


def with_right_checksum(body: bytes) -> bytes:
    """Return a sealed file's bytes with the checksum of the header they have."""
    end = 8 + int.from_bytes(body[:8], "little")
    at = body.find(_MARK, 8, end) + len(_MARK)
    if at < len(_MARK) or at + 8 > end:
        return body
    head = body[:at] + b"0" * 8 + body[at + 8 : end]
    return body[:at] + b"%08x" % zlib.crc32(head) + body[at + 8 :]


@target
def adapter_config(data: bytes, folder: Path) -> None:
    """Read an adapter's config file."""
    (folder / CONFIG_FILE).write_bytes(data)
    config, header = read_header(folder)
    assert isinstance(config, ICAEConfig)
    json.dumps(header)


@target
def adapter_header(data: bytes, folder: Path) -> None:
    """Read an adapter whose config is in its tensors' file alone."""
    metadata = {HEADER_KEY: data.decode("utf-8", "replace")}
    (folder / TENSORS_FILE).write_bytes(tensor_bytes(seeds.adapter_tensors(), metadata))
    assert read_adapter(folder).header["config"]


@target
def peft_config(data: bytes, folder: Path) -> None:
    """Read the config of an adapter that PEFT saved."""
    (folder / PEFT_CONFIG_FILE).write_bytes(data)
    tensors = {key.removeprefix("icae."): tensor for key, tensor in seeds.adapter_tensors().items()}
    (folder / PEFT_TENSORS_FILE).write_bytes(tensor_bytes(tensors, {}))
    assert isinstance(read_peft_adapter(folder).config, ICAEConfig)


@target
def shard_index(data: bytes, folder: Path) -> None:
    """Read the index of a reference checkpoint in shards."""
    (folder / "r.safetensors.index.json").write_bytes(data)
    (folder / "a.safetensors").write_bytes(tensor_bytes(seeds.adapter_tensors(), {}))
    infer_sizes(read_reference_file(folder / "r.safetensors"), "it")


@target
def reference_safetensors(data: bytes, folder: Path) -> None:
    """Read a reference checkpoint in safetensors."""
    _reference(data, folder / "r.safetensors")


@target
def reference_pickle(data: bytes, folder: Path) -> None:
    """Read a reference checkpoint of `torch.save`."""
    _reference(data, folder / "r.pt")


def _reference(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    tensors, _ = split_reference_tensors(read_reference_file(path))
    infer_sizes(tensors, str(path))


@target
def store_index(data: bytes, folder: Path) -> None:
    """Open a store with any bytes as its index, list it, read, delete and clean."""
    root = folder / "store"
    root.mkdir()
    (root / INDEX_FILE).write_bytes(data)
    _use_store(root)


@target
def store_rows(data: bytes, folder: Path) -> None:
    """Use a store whose index has any rows; files outside of the store and foreign files in it must stay."""
    root = folder / "store"
    (root / "ab").mkdir(parents=True)
    kept = (folder / "victim", root / "ab" / "notes.txt", root / "notes.safetensors")
    for path in kept:
        path.write_bytes(b"kept")
    (root / "cd").symlink_to(folder, target_is_directory=True)
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    rows = {f"key {i}": line.encode("utf-8", "replace").decode() for i, line in enumerate(lines[:8])}
    with suppress(Exception):  # two rows of one file are refused by the database itself
        install_index(root / INDEX_FILE, rows)
    try:
        _use_store(root)
    finally:
        for path in kept:
            assert path.read_bytes() == b"kept", path


def _use_store(root: Path) -> None:
    store = LocalFolder(root, create=False)
    try:
        for key in list(store.keys())[:8]:
            with suppress(ICAEError):
                store.read(key)
            with suppress(ICAEError):
                store.delete(key)
        store.clean(-1)
        store.write({"new": b"bytes"})
        assert bytes(store.read("new").numpy()) == b"bytes"
    finally:
        store.close()


_FORMS = (".jsonl", ".txt", ".parquet", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".jsonl.bz2", ".parquet")


@target
def records(data: bytes, folder: Path) -> None:
    """Read a file of records; the first byte chooses the form, and whether the rest is compressed first."""
    from icae_fast.training.data.records import read_records

    choice, body = data[:1] or b"\0", data[1:]
    form = _FORMS[choice[0] % len(_FORMS)]
    if choice[0] >= 128:
        body = _compressed(form, body)
    path = folder / f"rows{form}"
    path.write_bytes(body)
    for record in read_records([str(path)], ("text",)):
        record["text"].encode()
        assert record["text"] or record["problem"]


def _compressed(form: str, body: bytes) -> bytes:
    if form.endswith(".gz"):
        return gzip.compress(body, 1)
    if form.endswith(".xz"):
        return lzma.compress(body, preset=0)
    if form.endswith(".bz2"):
        return bz2.compress(body, 1)
    if form.endswith(".zst"):
        half = len(body) // 2  # two frames
        return b"".join(bytes(pa.compress(part, "zstd")) for part in (body[:half], body[half:]) if part)
    return body


@target
def settings(data: bytes, folder: Path) -> None:
    """Read training settings in YAML; what follows a NUL is an override of the command line."""
    from icae_fast.training.loop.settings_file import load_settings

    body, nul, override = data.partition(b"\0")
    (folder / "s.yaml").write_bytes(body)
    load_settings(folder / "s.yaml", [override.decode("utf-8", "surrogateescape")] if nul else [])


@target
def judge_reply(data: bytes, folder: Path) -> None:
    """Read a judge's reply, and a reply as JSON may hold it."""
    from icae_fast.training.chat.replies import reply_text
    from icae_fast.training.evaluation.instructions.verdicts import parse_verdict

    text = data.decode("utf-8", "surrogateescape")
    with suppress(ValueError):  # what both document
        reply_text(text).encode()
        assert parse_verdict(text) in ("A", "B", "TIE")


@target
def answer_cache(data: bytes, folder: Path) -> None:
    """Resume an evaluation from a cache file of any bytes, and go on with it."""
    from icae_fast.training.evaluation.cache import AnswerCache

    path = folder / "answers.jsonl"
    path.write_bytes(data)
    with AnswerCache(path) as cache:
        cache.put("key", "value")
    with AnswerCache(path) as cache:
        assert cache.get("key") == "value"


@target
def checkpoint_record(data: bytes, folder: Path) -> None:
    """Look for a checkpoint to continue from, with any record; an odd first byte has its checksum made right."""
    from icae_fast.training.loop.checkpoint_folder import FILES, RECORD_FILE, _record_of, find_checkpoint

    body = data[1:]
    if data[:1] and data[0] % 2:
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            body = _record_of(json.loads(body)["files"])
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    for name in FILES:
        (checkpoint / name).write_bytes(b"content")
    (checkpoint / RECORD_FILE).write_bytes(body)
    assert find_checkpoint(folder, "auto") == checkpoint
