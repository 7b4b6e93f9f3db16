"""Memory files: slots as safetensors, with a header that records the model and adapter that made them.

Format version 2 is sealed (`icae_fast.store.seal`), may have int8 slots and the slots' keys and values, and is the
format of a `MemoryStore`'s entries. Version 1, with plain slots and without checksums, can still be read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icae_fast.core.memory import Memory, SlotKV
from icae_fast.errors import CheckpointError, InvalidInputError
from icae_fast.io.files import load_tensors, map_file, parse_json, write_atomically
from icae_fast.store.header import FORMAT_VERSION, check_header
from icae_fast.store.provenance import Origin
from icae_fast.store.quantize import SlotDtype, pack_slots, unpack_slots
from icae_fast.store.seal import METADATA, Sealed, seal

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE

_REMEDY = "delete it and compress its text again"


@dataclass(frozen=True)
class PackedMemory:
    """A memory with its slots in the dtype of the file; make one with `of`, so that slots are quantised once.

    Args:
        tensors: from `pack_slots`.
        compute_dtype: dtype of the slots before packing.
        file_dtype: dtype of the slots that a reader of the file returns.
        n_source_tokens, span_lengths: as in `Memory`.
    """

    tensors: dict[str, torch.Tensor]
    compute_dtype: torch.dtype
    file_dtype: torch.dtype
    n_source_tokens: int
    span_lengths: tuple[int, ...]

    @classmethod
    def of(cls, memory: Memory, dtype: SlotDtype | None) -> PackedMemory:
        """Pack a memory's slots.

        Args:
            memory: the memory.
            dtype: dtype of the slots in the file; None for the one they have.

        Raises:
            InvalidInputError: the memory's spans do not add up to its tokens, so no reader would take the file.
        """
        if sum(memory.span_lengths) != memory.n_source_tokens:
            raise InvalidInputError(
                f"the memory's spans have {sum(memory.span_lengths)} tokens and the memory {memory.n_source_tokens}; "
                "compress the context again"
            )
        tensors, compute = pack_slots(memory.slots, dtype), memory.slots.dtype
        file_dtype = compute if dtype == "int8" else tensors["slots"].dtype
        return cls(tensors, compute, file_dtype, memory.n_source_tokens, memory.span_lengths)

    def memory(self) -> Memory:
        """Return the memory with the values that the file will have, in its first dtype."""
        slots = unpack_slots(self.tensors, self.compute_dtype).to(self.compute_dtype)
        return Memory(slots, self.n_source_tokens, self.span_lengths)

    def encode(
        self,
        origin: Origin,
        *,
        kv: SlotKV | None = None,
        key: str | None = None,
        source_hash: str | None = None,
    ) -> bytearray:
        """Return the content of a memory file.

        Args:
            origin: provenance of the memory.
            kv: keys and values of its slots.
            key: key of the entry in a store.
            source_hash: hash of the text's token ids, see `provenance.source_hash`.

        Returns:
            The same bytes for the same arguments, except that the header of an entry with a key has the time.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "n_source_tokens": self.n_source_tokens,
            "span_lengths": list(self.span_lengths),
            **origin.to_header(),
            "slots_dtype": str(self.file_dtype).removeprefix("torch."),
            "key": key,
            "source_hash": source_hash,
            "created": None if key is None else time.time(),
        }
        return _seal(self.tensors, header, kv)


def _seal(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], kv: SlotKV | None) -> bytearray:
    if kv is None:
        return seal(tensors, {**header, "kv_prefix_ids": None})
    # Stored as (n_layers, Hkv, n_slots, D), each head contiguous, so that kernels read the mapped file directly.
    heads = {"keys": kv.keys.transpose(1, 2), "values": kv.values.transpose(1, 2)}
    return seal({**tensors, **heads}, {**header, "kv_prefix_ids": list(kv.prefix_ids)})


class MemoryFile:
    """A memory file with a parsed header; slots, keys and values are read on demand.

    Attributes:
        header: JSON values, see `PackedMemory.encode`.
        origin: provenance of the memory.
        what: name of the file in error messages.
    """

    def __init__(self, header: dict[str, Any], sealed: Sealed, what: str) -> None:
        self.header, self.what, self._sealed = header, what, sealed
        self.origin = check_header(header, sealed.tensors, what)
        self._spans: tuple[int, tuple[int, ...]] = header["n_source_tokens"], tuple(header["span_lengths"])

    @classmethod
    def read(cls, blob: torch.Tensor, what: str, *, whole: bool = True) -> MemoryFile:
        """Read the header of a version 2 file.

        Args:
            blob: (size,) uint8, the bytes of the file.
            what: name of the file in error messages.
            whole: off if the blob is the beginning of a file; then only the header can be used.

        Raises:
            CheckpointError: the file is truncated, damaged or no memory file.
        """
        try:
            sealed = Sealed.open(blob, whole=whole)
        except ValueError as error:
            raise CheckpointError(f"{what} is damaged: {error}; {_REMEDY}") from error
        return cls(sealed.fields, sealed, what)

    def memory(self, verify: bool = True) -> Memory:
        """Return the memory; its slots are views of the file's bytes, or for int8 a new tensor in the first dtype.

        Raises:
            CheckpointError: with `verify`, the slots' checksum is wrong.
        """
        dtype = getattr(torch, self.header["slots_dtype"])
        return Memory(unpack_slots(self._slot_tensors(verify), dtype), *self._spans)

    def kv(self, verify: bool = True) -> SlotKV | None:
        """Return keys and values as views of the file's bytes with each head contiguous, or None if there are none.

        Raises:
            CheckpointError: with `verify`, their checksum is wrong.
        """
        if self.header["kv_prefix_ids"] is None:
            return None
        keys, values = (self._tensor(n, verify).transpose(1, 2) for n in ("keys", "values"))
        return SlotKV(keys, values, tuple(self.header["kv_prefix_ids"]))

    def with_kv(self, kv: SlotKV) -> bytearray:
        """Return the content of a file with bit-identical slots and other keys and values.

        Raises:
            CheckpointError: the slots' checksum is wrong.
        """
        header = self.header | {"created": time.time()}
        return _seal(self._slot_tensors(verify=True), header, kv)

    def _slot_tensors(self, verify: bool) -> dict[str, torch.Tensor]:
        return {n: self._tensor(n, verify) for n in ("slots", "slots_scale") if n in self._sealed.tensors}

    def _tensor(self, name: str, verify: bool) -> torch.Tensor:
        try:
            return self._sealed.tensor(name, verify)
        except ValueError as error:
            raise CheckpointError(f"{self.what} is damaged: {error}; {_REMEDY}") from error


def save_memory(path: str | Path, memory: Memory, icae: ICAE, *, dtype: SlotDtype | None = None) -> None:
    """Write a memory and its provenance into a file, either completely or not at all.

    Args:
        path: the file.
        memory: the memory.
        icae: the model that made it.
        dtype: dtype of the slots in the file, "bfloat16" or "int8"; None for the one they have.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        write_atomically({Path(path): PackedMemory.of(memory, dtype).encode(Origin.of(icae))})
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; free space or choose another path") from error


def read_memory_header(path: str | Path) -> tuple[Memory, dict[str, Any]]:
    """Return (memory, header) of a file, of any model.

    Raises:
        CheckpointError: the file is truncated, damaged or no memory file.
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
        header = parse_json(metadata[METADATA])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no memory file; make one with `icae-fast compress`") from error
    if header.get("format_version") == FORMAT_VERSION:
        raise CheckpointError(f"{path} is damaged: it has lost its checksums; {_REMEDY}")
    origin = check_header(header, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, str(path))
    return Memory(tensors["slots"], header["n_source_tokens"], tuple(header["span_lengths"])), header, origin


def load_memory(path: str | Path, icae: ICAE) -> Memory:
    """Load a memory that exactly this model and adapter made, on the model's device.

    On the CPU, and if the file has the model's dtype, the slots are mapped from the file and not copied.

    Raises:
        CheckpointError: the file is truncated, damaged or no memory file.
        BaseModelMismatchError: a different base model or adapter made the memory.
    """
    memory, _, origin = _read(path)
    Origin.of(icae).check(origin, str(path))
    return memory.to(device=icae.device, dtype=icae.dtype)
