"""A memory in a file of its own: slots as safetensors, with a header that says what made them.

Version 2 of the format is sealed (`icae_fast.store.seal`), may hold int8 slots and the slots' keys and values, and is
what
a `MemoryStore` consists of. Version 1, slots alone and without checksums, is still read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icae_fast.core.memory import Memory, SlotKV
from icae_fast.errors import CheckpointError
from icae_fast.io.files import load_tensors, map_file, write_atomically
from icae_fast.store.provenance import Origin
from icae_fast.store.quantize import SlotDtype, pack_slots, unpack_slots
from icae_fast.store.seal import METADATA, Sealed, seal

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE

FORMAT_VERSION = 2
_REMEDY = "delete it and compress its text again"


def encode_memory(
    memory: Memory,
    origin: Origin,
    *,
    dtype: SlotDtype | None = None,
    kv: SlotKV | None = None,
    key: str | None = None,
    source_hash: str | None = None,
) -> bytearray:
    """The content of a memory file.

    Args:
        memory: the memory; origin: what made it.
        dtype: of the slots in the file; None for the one that they have.
        kv: keys and values of its slots.
        key: in a store.
        source_hash: of the text's token ids, see `origin.source_hash`.

    Returns:
        The same bytes for the same arguments; with a key there is the time in them, too.
    """
    tensors = pack_slots(memory.slots, dtype)
    header = {
        "format_version": FORMAT_VERSION,
        "n_source_tokens": memory.n_source_tokens,
        "span_lengths": list(memory.span_lengths),
        **origin.to_header(),
        "slots_dtype": _name(memory.slots.dtype if dtype == "int8" else tensors["slots"].dtype),
        "key": key,
        "source_hash": source_hash,
        "created": None if key is None else time.time(),
    }
    return _seal(tensors, header, kv)


def _seal(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], kv: SlotKV | None) -> bytearray:
    if kv is None:
        return seal(tensors, {**header, "kv_prefix_ids": None})
    # As (n_layers, Hkv, n_slots, D), a head's side by side, so that kernels read them where they are mapped.
    beside = {"keys": kv.keys.transpose(1, 2), "values": kv.values.transpose(1, 2)}
    return seal({**tensors, **beside}, {**header, "kv_prefix_ids": list(kv.prefix_ids)})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class MemoryFile:
    """A memory file whose header has been read; slots, keys and values are read when asked for.

    Attributes:
        header: its JSON values, see `encode_memory`.
        origin: what made it.
        what: how error messages call it.
    """

    def __init__(self, header: dict[str, Any], sealed: Sealed, what: str) -> None:
        self.header, self.what, self._sealed = header, what, sealed
        self.origin = _parsed(header, what)
        self._spans = header["n_source_tokens"], tuple(header["span_lengths"])

    @classmethod
    def read(cls, blob: torch.Tensor, what: str) -> MemoryFile:
        """Read a version 2 file out of its bytes, (size,) uint8.

        Raises:
            CheckpointError: truncated, damaged or no such file.
        """
        try:
            sealed = Sealed.open(blob)
        except ValueError as error:
            raise CheckpointError(f"{what} is damaged: {error}; {_REMEDY}") from error
        return cls(sealed.fields, sealed, what)

    def memory(self, verify: bool = True) -> Memory:
        """The memory; slots are views into the file's bytes, but int8 ones are a new tensor in their first dtype.

        Raises:
            CheckpointError: with `verify`, the slots' checksum is wrong.
        """
        dtype = getattr(torch, self.header["slots_dtype"])
        return Memory(unpack_slots(self._slot_tensors(verify), dtype), *self._spans)

    def kv(self, verify: bool = True) -> SlotKV | None:
        """Keys and values as views into the file's bytes, a head's side by side, or None where it has none.

        Raises:
            CheckpointError: with `verify`, their checksum is wrong.
        """
        if self.header["kv_prefix_ids"] is None:
            return None
        keys, values = (self._tensor(n, verify).transpose(1, 2) for n in ("keys", "values"))
        return SlotKV(keys, values, tuple(self.header["kv_prefix_ids"]))

    def with_kv(self, kv: SlotKV) -> bytearray:
        """The content of a file like this one, bit for bit the same slots in it, with other keys and values.

        Raises:
            CheckpointError: the slots' checksum is wrong.
        """
        header = self.header | {"created": time.time()}
        return _seal(self._slot_tensors(verify=True), header, kv)

    def _slot_tensors(self, verify: bool) -> dict[str, torch.Tensor]:
        return {n: self._tensor(n, verify) for n in ("slots", "slots_scale") if n in self._sealed.names}

    def _tensor(self, name: str, verify: bool) -> torch.Tensor:
        try:
            return self._sealed.tensor(name, verify)
        except ValueError as error:
            raise CheckpointError(f"{self.what} is damaged: {error}; {_REMEDY}") from error


def _parsed(header: Any, what: str) -> Origin:
    """The origin in a header, if this version of the package can read it."""
    try:
        version = header["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{what} has format version {version}; install a newer icae-fast to read it")
        header["n_source_tokens"], tuple(header["span_lengths"])
        return Origin.from_header(header)
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what} is no memory file; make one with `icae-fast compress`") from error


def save_memory(path: str | Path, memory: Memory, icae: ICAE, *, dtype: SlotDtype | None = None) -> None:
    """Write a memory and the identity of the model and adapter that made it, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        write_atomically({Path(path): encode_memory(memory, Origin.of(icae), dtype=dtype)})
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; free space or choose another path") from error


def read_memory_header(path: str | Path) -> tuple[Memory, dict[str, Any]]:
    """The memory in a file and its header, whatever model made it.

    Raises:
        CheckpointError: truncated, damaged, or no memory file.
    """
    memory, header, _ = _read(path)
    return memory, header


def _read(path: str | Path) -> tuple[Memory, dict[str, Any], Origin]:
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}; check the path")
    try:
        blob = map_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}; check its permissions") from error
    if Sealed.found(blob):
        file = MemoryFile.read(blob, str(path))
        return file.memory(), file.header, file.origin
    tensors, metadata = load_tensors(path)
    try:
        header = json.loads(metadata[METADATA])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no memory file; make one with `icae-fast compress`") from error
    origin = _parsed(header, str(path))
    if header["format_version"] > 1 or "slots" not in tensors:
        raise CheckpointError(f"{path} is damaged: it has lost its checksums; {_REMEDY}")
    return Memory(tensors["slots"], header["n_source_tokens"], tuple(header["span_lengths"])), header, origin


def load_memory(path: str | Path, icae: ICAE) -> Memory:
    """A memory of this very model and adapter from a file, on the model's device.

    On the CPU and in the model's dtype the slots are mapped from the file and not copied.

    Raises:
        CheckpointError: truncated, damaged, or no memory file.
        BaseModelMismatchError: another base model or another adapter made it.
    """
    memory, _, origin = _read(path)
    Origin.of(icae).check(origin, str(path))
    return memory.to(device=icae.device, dtype=icae.dtype)
