"""`MemoryStore`: many memories in a folder, safe with several processes, and found again by their text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from icae_fast.core.inputs import Context, as_list
from icae_fast.core.memory import Memory, SlotKV, check_kv, check_memory
from icae_fast.errors import CheckpointError, InvalidInputError, MemoryNotFoundError, NonFiniteError
from icae_fast.model.icae import ICAE
from icae_fast.store import local as store_local
from icae_fast.store.local import LocalFolder
from icae_fast.store.memory_file import MemoryFile, encode_memory
from icae_fast.store.provenance import Origin, OriginTracker, content_key, source_hash
from icae_fast.store.quantize import check_slot_dtype, pack_slots, unpack_slots
from icae_fast.store.remote import RemoteFolder

log = logging.getLogger(__name__)

_WASTE_SECONDS = 3600.0


class MemoryStore:
    """A folder of memories, each in a sealed safetensors file that says which model and adapter made it.

        store = MemoryStore("memories", icae)
        memories = store.compress([text, other_text])     # what is there already is not compressed again
        store.put("handbook", memories[0], kv=True)       # with what the decoder computes of the slots
        memory = store.get("handbook", kv=True)           # mapped, not copied

    Any number of threads and processes may use one folder at once. When `put` returns, the entry is on the disk; a
    process that is killed at any moment leaves every entry whole. Every byte of a file is under a checksum.

    A local folder has an SQLite index, which must be on a local disk (its locks do not work on network file systems)
    where readers may write, too: they take their locks in a file beside it.
    Other addresses that fsspec knows have one object for each entry and no index: `put` is atomic where objects are
    written whole (S3, GCS, Azure; not SFTP), `get` fetches the object, and `len` and `keys` list the folder.

    Args:
        path: a folder, or an address such as "s3://bucket/memories".
        icae: the model. Entries that another base model or adapter made are refused. An `Origin` stands for a model
            that is not in memory; with None entries can be read, whatever made them, and none can be put.
        dtype: of slots that are put: "bfloat16", "int8" (one fp32 scale a slot; a quarter to half the bytes), or
            None for the one that they have.
        verify: compare checksums in `get` and `get_kv`, which reads each byte once. Headers are always compared.
        create: make the folder and its index if there is none.
        storage_options: for the fsspec file system of a remote address.

    Raises:
        StoreError: there is no store and `create` is off, the folder cannot be used, or the index is damaged. So do all
            methods.
        InvalidInputError: another `dtype` or `icae`.
    """

    def __init__(
        self, path: str | Path, icae: ICAE | Origin | None = None, *, dtype: str | None = None, verify: bool = True,
        create: bool = True, storage_options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(icae, (ICAE, Origin, type(None))):
            raise InvalidInputError(f"icae is a {type(icae).__name__}; pass the ICAE, an Origin, or None")
        self.dtype, self.verify = check_slot_dtype(dtype), verify
        self.icae = icae if isinstance(icae, ICAE) else None
        self._tracker = OriginTracker(icae) if isinstance(icae, ICAE) else None
        self._origin = icae if isinstance(icae, Origin) else None
        local = _local_path(path)
        self._folder = LocalFolder(local, create) if local else RemoteFolder(str(path), storage_options or {})

    def __repr__(self) -> str:
        return f"MemoryStore({str(self._folder)!r})"

    def put(self, key: str, memory: Memory, *, kv: SlotKV | bool = False, source_hash: str | None = None) -> None:
        """Store a memory of this model, in place of any that has the key. It is on the disk when this returns.

        Args:
            key: any text.
            memory: what `icae.compress` gave. It is written down as the work of the model as it is now.
            kv: keep the decoder's keys and values of the slots beside them: True for what `ICAE.memory_kv` gives for
                the slots as they are stored, or such as you have. For SmolLM2 they take 20 times the slots' bytes.
            source_hash: for the header, see `icae_fast.store.provenance.source_hash`.

        Raises:
            InvalidInputError: the store has no model, or with `kv=True` no ICAE; a bad key, or a memory or keys and
                values of another shape.
            NonFiniteError: the slots, or their keys and values, hold NaN or infinity.
            StoreError: it cannot be written; what had the key before stays.
        """
        origin = self._current(exact=True)
        if origin is None:
            raise InvalidInputError(
                "the store was opened without a model, so it is for reading; pass icae= to MemoryStore"
            )
        check_memory(memory, origin.config.memory_size, origin.base["hidden_size"])
        key = _checked(key)
        if kv is True:
            kv = self._own_icae("compute keys and values").memory_kv(self._as_stored(memory))
        elif kv is not False:
            check_kv(kv, origin.base["num_hidden_layers"], memory.n_slots, origin.base["num_key_value_heads"])
            if not kv.is_finite():
                raise NonFiniteError("the keys and values hold NaN or infinity; compute them again")
        self._folder.write({key: self._encode(memory, origin, key, source_hash, kv or None)})

    def _encode(self, memory, origin, key, source, kv=None) -> bytearray:
        return encode_memory(memory, origin, dtype=self.dtype, kv=kv, key=key, source_hash=source)

    def get(self, key: str, *, kv: bool = False) -> Memory:
        """The memory that has a key.

        On the CPU its slots are mapped from the file: nothing is copied, pages are read when they are used, and
        writing to the slots changes this process's memory alone. They are copied where they have to be changed: int8
        slots, a model on another device or in another dtype, and a remote store.

        Args:
            key: of the memory.
            kv: also give the ICAE the keys and values that were put with it (`ICAE.adopt_kv`), mapped like slots, so
                that answering reads no slot. They are left, and the decoder computes its own when it first reads the
                memory, where there are none, where they are behind another prefix than `icae.prefix_ids` or in
                another dtype than the model's, and where they pass `icae.kv_budget`, of which the log has a warning.

        Returns:
            On the model's device and in its dtype; without a model on the CPU and as stored (int8: in the dtype that
            was put).

        Raises:
            MemoryNotFoundError: there is none.
            CheckpointError: its file is missing, truncated or damaged; the message names the entry.
            BaseModelMismatchError: another base model or adapter made it.
            InvalidInputError: `kv` in a store that has no ICAE.
        """
        if kv:
            self._own_icae("take keys and values")
        file = self._open(key)
        memory = self._memory(file)
        if kv:
            self._adopt(file, memory)
        return memory

    def _memory(self, file: MemoryFile) -> Memory:
        memory = file.memory(self.verify)
        return memory if self.icae is None else memory.to(device=self.icae.device, dtype=self.icae.dtype)

    @torch.inference_mode(False)  # what the ICAE keeps must be of use outside of that mode
    def _adopt(self, file: MemoryFile, memory: Memory) -> bool:
        """Give an entry's keys and values to the ICAE; has it any that the ICAE can use?"""
        prefix = file.header["kv_prefix_ids"]
        if prefix is None or tuple(prefix) != self.icae.prefix_ids:
            return False
        kv = file.kv(self.verify)
        if kv.keys.dtype != self.icae.dtype:
            return False
        kv = SlotKV(kv.keys.to(self.icae.device), kv.values.to(self.icae.device), kv.prefix_ids)
        if not self.icae.adopt_kv(memory, kv):
            log.warning(
                "%s: its keys and values, %d bytes, pass icae.kv_budget=%d and are computed for each call; raise it",
                file.what, kv.nbytes, self.icae.kv_budget,
            )  # fmt: skip
        return True

    @torch.inference_mode(False)
    def get_kv(self, key: str, prefix_ids: Sequence[int] | None = None) -> SlotKV | None:
        """The keys and values that were put with a memory, mapped like slots.

        Args:
            key: of the memory.
            prefix_ids: the tokens that will stand before the slots; None for whatever was put.

        Returns:
            None if there are none, or they are for another prefix: then they have to be computed.

        Raises:
            MemoryNotFoundError, CheckpointError, BaseModelMismatchError: see `get`.
        """
        kv = self._open(key).kv(self.verify)
        if kv is None or (prefix_ids is not None and tuple(prefix_ids) != kv.prefix_ids):
            return None
        if self.icae is None:
            return kv
        keys, values = (t.to(device=self.icae.device, dtype=self.icae.dtype) for t in (kv.keys, kv.values))
        return SlotKV(keys, values, kv.prefix_ids)

    def header(self, key: str) -> dict[str, Any]:
        """What an entry's file says about it, as JSON values; see `memory_file.encode_memory`.

        Raises:
            MemoryNotFoundError, CheckpointError: see `get`.
        """
        return self._read(key).header

    def compress(
        self, contexts: Context | Sequence[Context], *, kv: bool = False, token_budget: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Memory]:  # fmt: skip
        """`icae.compress`, but what the store holds is read, and the rest, compressed in one call, is put into it.

        Entries are found by token ids, base model, adapter, config and dtype: see `key_of`.

        Args:
            contexts, token_budget, on_progress: see `ICAE.compress`.
            kv: as in `put` and `get`. An entry whose keys and values `get` would leave gets them now, in place of any
                that it has. Being large, entries are put one by one, each as soon as they are computed.

        Returns:
            A `Memory` for each context, as `get` gives it, also where it was just compressed.

        Raises:
            InvalidInputError: the store has no ICAE. Else see `ICAE.compress`, `put` and `get`.
        """
        origin = self._own(exact=True)
        rows = [self.icae.context_ids(c, f"context {i}") for i, c in enumerate(as_list(contexts))]
        sources = [source_hash(ids) for ids in rows]
        keys = [content_key(source, origin, self.icae.dtype) for source in sources]
        memories: dict[str, Memory] = {}
        missing: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key not in memories and key not in missing:
                try:
                    memories[key] = self._got(key, kv)
                except MemoryNotFoundError:
                    missing[key] = i
        if missing:
            made = self.icae.compress(
                [rows[i] for i in missing.values()], token_budget=token_budget, on_progress=on_progress
            )
            new = {k: (m, sources[missing[k]]) for k, m in zip(missing, made, strict=True)}
            memories |= {k: self._as_stored(m) for k, (m, _) in new.items()}
            if kv:
                for k, (m, source) in new.items():
                    self._folder.write({k: self._encode(m, origin, k, source, self.icae.memory_kv(memories[k]))})
            else:
                self._folder.write({k: self._encode(m, origin, k, source) for k, (m, source) in new.items()})
        return [memories[key] for key in keys]

    def _got(self, key: str, kv: bool) -> Memory:
        """`get`, and with `kv` an entry without usable keys and values is put again with them."""
        file = self._open(key)
        memory = self._memory(file)
        if kv and not self._adopt(file, memory):
            self._folder.write({key: file.with_kv(self.icae.memory_kv(memory))})
        return memory

    def _as_stored(self, memory: Memory) -> Memory:
        slots = unpack_slots(pack_slots(memory.slots, self.dtype), memory.slots.dtype).to(memory.slots.dtype)
        return Memory(slots, memory.n_source_tokens, memory.span_lengths)

    def key_of(self, context: Context) -> str:
        """The key under which `compress` keeps a context: 32 hex digits.

        Raises:
            InvalidInputError: the store has no ICAE, or `ICAE.compress` would not take the context.
        """
        origin = self._own(exact=True)
        return content_key(source_hash(self.icae.context_ids(context)), origin, self.icae.dtype)

    def delete(self, key: str) -> bool:
        """Remove an entry, damaged ones too; was there one? Memories that were got stay usable."""
        return self._folder.delete(_checked(key))

    def keys(self) -> Iterator[str]:
        """All keys in order; what other processes put or delete meanwhile may or may not be among them."""
        return self._folder.keys()

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _checked(key) in self._folder

    def __len__(self) -> int:
        return len(self._folder)

    def clean(self, older_than: float = _WASTE_SECONDS) -> int:
        """Delete what killed processes have left.

        Args:
            older_than: seconds; younger files may belong to a put that is under way.

        Returns:
            The number of files.
        """
        return self._folder.clean(older_than)

    @staticmethod
    def rebuild(path: str | Path) -> list[str]:
        """Make the index of a local store anew from its files, which say what they are.

        No other process may use the store meanwhile. Of several files with one key the newest is taken; an entry comes
        back whose deletion was cut off between index and file.

        Returns:
            Files that could not be read and are left out.
        """
        local = _local_path(path)
        if local is None:
            raise InvalidInputError(f"{path} is remote, and a remote store has no index; there is nothing to rebuild")
        return store_local.rebuild(local)

    def close(self) -> None:
        """Close the index; memories that were got stay usable."""
        self._folder.close()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.inference_mode(False)
    def _read(self, key: str) -> MemoryFile:
        what = f"entry {key!r} of the store {self._folder}"
        file = MemoryFile.read(self._folder.read(_checked(key)), what)
        if file.header["key"] != key:
            raise CheckpointError(f"{what} holds another entry, {file.header['key']!r}; delete it and put it again")
        return file

    def _open(self, key: str) -> MemoryFile:
        """An entry's file, if this model made it."""
        file, origin = self._read(key), self._current(exact=False)
        if origin is not None:
            origin.check(file.origin, file.what)
        return file

    def _current(self, *, exact: bool) -> Origin | None:
        return self._origin if self._tracker is None else self._tracker.current(exact=exact)

    def _own(self, *, exact: bool) -> Origin:
        self._own_icae("compress")
        return self._tracker.current(exact=exact)

    def _own_icae(self, what: str) -> ICAE:
        if self.icae is None:
            raise InvalidInputError(f"the store was opened without an ICAE, so it cannot {what}; pass icae=")
        return self.icae


def _checked(key: str) -> str:
    try:
        if isinstance(key, str) and key and key.encode():
            return key
    except UnicodeEncodeError:
        pass
    raise InvalidInputError(f"{key!r} is no key; give a text of at least one character")


def _local_path(path: str | Path) -> Path | None:
    """The folder that a path means, or None for an address elsewhere."""
    scheme, separator, rest = str(path).partition("://")
    if not separator:
        return Path(path)
    return Path(rest) if scheme in ("file", "local") else None
