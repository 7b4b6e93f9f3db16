"""`MemoryStore`: many memories in a folder, safe for several processes, found by key or by text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from icae_fast.core.inputs import Context
from icae_fast.core.memory import Memory, SlotKV, check_kv, check_memory
from icae_fast.errors import CheckpointError, InvalidInputError, NonFiniteError
from icae_fast.model.icae import ICAE
from icae_fast.store.compressing import Compressed, Job, memories_of
from icae_fast.store.local import LocalFolder, rebuild
from icae_fast.store.memory_file import MemoryFile, PackedMemory
from icae_fast.store.provenance import Origin, OriginTracker, content_key, source_hash
from icae_fast.store.quantize import SlotDtype, check_slot_dtype
from icae_fast.store.remote import RemoteFolder

log = logging.getLogger(__name__)

_WASTE_SECONDS = 3600.0


class MemoryStore:
    """A folder of memories, each in a sealed safetensors file that records the model and adapter that made it.

        store = MemoryStore("memories", icae)
        memories = store.compress([text, other_text])     # texts that the store has are not compressed again
        store.put("handbook", memories[0], kv=True)       # with the decoder's keys and values of the slots
        memory = store.get("handbook", kv=True)           # mapped, not copied

    Any number of threads and processes may use one folder at once. When `put` returns, the entry is on disk. A process
    killed at any moment leaves every entry intact. Checksums cover every byte of a file.

    A local folder has an SQLite index, which must be on a local disk, because its locks do not work on network file
    systems. A folder that cannot be written can be read; where it can be, readers write too: their locks are in a
    file beside the index.
    Other addresses that fsspec supports have one object per entry and no index. There, `put` is atomic if the service
    writes whole objects (S3, GCS, Azure; not SFTP), `get` fetches the object, and `len` and `keys` list the folder.

    Args:
        path: a folder, or an address such as "s3://bucket/memories".
        icae: the model. Entries of a different base model or adapter are refused. An `Origin` replaces a model that
            is not loaded. With None, entries of any model can be read, and none can be put.
        dtype: dtype of slots that are put: "bfloat16", "int8" (one fp32 scale per slot; a quarter to half the bytes),
            or None for the dtype they have.
        verify: compare checksums in `get` and `get_kv`, which reads each byte once. Headers are always checked.
        create: create the folder and its index if necessary.
        storage_options: options of the fsspec file system of a remote address.

    Raises:
        StoreError: there is no store and `create` is off, the folder cannot be used, or the index is damaged. All
            methods raise it too.
        InvalidInputError: `dtype` or `icae` is something else.
        MissingPackageError: the package for a remote address is not installed.
    """

    def __init__(
        self, path: str | Path, icae: ICAE | Origin | None = None, *, dtype: SlotDtype | None = None,
        verify: bool = True, create: bool = True, storage_options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(icae, (ICAE, Origin, type(None))):
            raise InvalidInputError(f"icae is a {type(icae).__name__}; pass the ICAE, an Origin, or None")
        self.dtype, self.verify = check_slot_dtype(dtype), verify
        self.icae = icae if isinstance(icae, ICAE) else None
        self._tracker = OriginTracker(icae) if isinstance(icae, ICAE) else None
        self._origin = icae if isinstance(icae, Origin) else None
        local = _local_path(path)
        self._folder: LocalFolder | RemoteFolder = (
            LocalFolder(local, create) if local else RemoteFolder(str(path), storage_options or {})
        )

    def __repr__(self) -> str:
        return f"MemoryStore({str(self._folder)!r})"

    def put(self, key: str, memory: Memory, *, kv: SlotKV | bool = False, source_hash: str | None = None) -> None:
        """Store a memory, replacing any entry with this key; it is on disk when this returns.

        Args:
            key: any non-empty text.
            memory: from `icae.compress`. The model's current state is recorded as its provenance.
            kv: also store the decoder's keys and values of the slots: True to compute them from the slots as stored
                (`ICAE.memory_kv`), or a `SlotKV`. For SmolLM2 they take 20 times the bytes of the slots.
            source_hash: for the header, see `icae_fast.store.provenance.source_hash`.

        Raises:
            InvalidInputError: the store has no model, or no ICAE for `kv=True`; the key is invalid; or the memory or
                the keys and values have the wrong shape.
            NonFiniteError: slots, keys or values contain NaN or infinity.
            StoreError: the entry cannot be written; an older entry with this key remains.
        """
        origin = self._current(exact=True)
        if origin is None:
            raise InvalidInputError(
                "the store was opened without a model, so it is for reading; pass icae= to MemoryStore"
            )
        check_memory(memory, origin.config.memory_size, origin.base["hidden_size"])
        key = _checked(key)
        packed = PackedMemory.of(memory, self.dtype)
        slot_kv: SlotKV | None = None
        if kv is True:
            slot_kv = self._own_icae("compute keys and values").memory_kv(packed.memory())
        elif kv is not False:
            check_kv(kv, origin.base["num_hidden_layers"], memory.n_slots, origin.base["num_key_value_heads"])
            if not kv.is_finite():
                raise NonFiniteError("the keys and values hold NaN or infinity; compute them again")
            slot_kv = kv
        self._folder.write({key: packed.encode(origin, kv=slot_kv, key=key, source_hash=source_hash)})

    def get(self, key: str, *, kv: bool = False) -> Memory:
        """Return the memory with a key.

        On the CPU its slots are mapped from the file: nothing is copied, pages are read when they are used, and a
        write to the slots stays in this process. They are copied if they must be converted (int8 slots, a model on
        another device or in another dtype) and from a remote store.

        Args:
            key: key of the entry.
            kv: let the ICAE adopt the stored keys and values (`ICAE.adopt_kv`), mapped like slots, so that answering
                reads no slot. They are skipped, and the decoder computes them when it first reads the memory, if
                there are none, if they belong to a prefix other than `icae.prefix_ids` or have another dtype than
                the model, or if they exceed `icae.kv_budget`, of which a warning is logged.

        Returns:
            The memory on the model's device and in its dtype. Without a model: on the CPU and as stored, with int8
            slots in the dtype in which they were put.

        Raises:
            MemoryNotFoundError: there is no such entry.
            CheckpointError: its file is missing, truncated or damaged; the message names the entry.
            BaseModelMismatchError: a different base model or adapter made it.
            InvalidInputError: `kv` in a store without an ICAE.
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

    @torch.inference_mode(False)  # the ICAE keeps these tensors, which must be usable outside inference mode
    def _adopt(self, file: MemoryFile, memory: Memory) -> bool:
        """Let the ICAE adopt an entry's keys and values; return whether there are any that it can use."""
        icae = self._own_icae("take keys and values")
        prefix = file.header["kv_prefix_ids"]
        if prefix is None:
            return False
        if tuple(prefix) != icae.prefix_ids:
            log.warning(
                "%s: its keys and values are left aside: they belong to another prefix of the chat template (%d tokens "
                "against %d now); set icae.chat_template_kwargs as it was, or compress with kv=True again",
                file.what, len(prefix), len(icae.prefix_ids),
            )  # fmt: skip
            return False
        kv = file.kv(self.verify)
        if kv is None:
            return False
        if kv.keys.dtype != icae.dtype:
            log.warning(
                "%s: its keys and values are left aside: they are in %s, the model in %s; compress with kv=True again",
                file.what, kv.keys.dtype, icae.dtype,
            )  # fmt: skip
            return False
        kv = SlotKV(kv.keys.to(icae.device), kv.values.to(icae.device), kv.prefix_ids)
        if not icae.adopt_kv(memory, kv):
            log.warning(
                "%s: its keys and values, %d bytes, exceed icae.kv_budget=%d and are computed in each call; raise it",
                file.what, kv.nbytes, icae.kv_budget,
            )  # fmt: skip
        return True

    @torch.inference_mode(False)
    def get_kv(self, key: str, prefix_ids: Sequence[int] | None = None) -> SlotKV | None:
        """Return the keys and values stored with a memory, mapped like slots.

        Args:
            key: key of the entry.
            prefix_ids: the tokens that will precede the slots; None to accept any.

        Returns:
            None if there are none or they belong to another prefix; they must be computed then.

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
        """Return the header of an entry's file as JSON values; see `memory_file.PackedMemory.encode`.

        The tensors are not read, neither from a disk nor from a remote store.

        Raises:
            MemoryNotFoundError, CheckpointError: see `get`.
        """
        return self._read(key, whole=False).header

    def compress(
        self, contexts: Context | Sequence[Context], *, kv: bool = False, token_budget: int | None = None,
        on_progress: Callable[[int, int], None] | None = None, names: Sequence[str] | None = None,
    ) -> list[Memory]:  # fmt: skip
        """Return a memory for each context: read from the store if it is there, else compressed and stored.

        Entries are found by token ids, base model, adapter, config and dtype: see `key_of`. Missing contexts are
        compressed in batches of about `token_budget` tokens, and each batch is stored when it is done. A context that
        cannot be compressed stops no other. A damaged entry is compressed again, of which a warning is logged.

        Args:
            contexts, token_budget, on_progress: see `ICAE.compress`.
            kv: as in `put` and `get`. Keys and values of an entry that `get` would skip are computed and stored. Such
                entries are large, so they are put one by one, each when its keys and values are computed.
            names: what each context is called in messages, e.g. its file; None for "context 0" and so on.

        Returns:
            A `Memory` for each context, equal to the one that `get` returns, even if it was just compressed.

        Raises:
            SomeFailedError: some contexts are empty, too long or otherwise bad. All others are in the store by then.
                It has their `memories`, and the `failures` by place.
            InvalidInputError: the store has no ICAE. For others, which are raised if no context can be compressed or
                the call cannot go on, see `ICAE.compress`, `put` and `get`.
        """
        each = self.compress_each(contexts, kv=kv, token_budget=token_budget, on_progress=on_progress, names=names)
        return memories_of(list(each))

    def compress_each(
        self, contexts: Context | Sequence[Context], *, kv: bool = False, token_budget: int | None = None,
        on_progress: Callable[[int, int], None] | None = None, names: Sequence[str] | None = None,
    ) -> Iterator[Compressed]:  # fmt: skip
        """Do as `compress`, and yield each context when its memory is stored, found or impossible.

        Args:
            contexts, kv, token_budget, on_progress, names: see `compress`.

        Yields:
            (place, name, key, memory, error) of each context, in the order in which they are done.

        Raises:
            ICAEError: the call cannot go on; see `compress`.
        """
        icae, origin = self._own(exact=True)
        job = Job(icae, origin, self.dtype, lambda key: self._got(key, kv), self._folder.write, kv)
        return job.run(contexts, names, token_budget, on_progress)

    def _got(self, key: str, kv: bool) -> Memory:
        """Like `get`, and with `kv` store missing or unusable keys and values of the entry again."""
        file = self._open(key)
        memory = self._memory(file)
        if kv and not self._adopt(file, memory):
            slot_kv = self._own_icae("compute keys and values").memory_kv(memory)
            self._folder.write({key: file.with_kv(slot_kv)})
        return memory

    def key_of(self, context: Context) -> str:
        """Return the key under which `compress` stores a context, 32 hex digits.

        Raises:
            InvalidInputError: the store has no ICAE, or `ICAE.compress` would refuse the context.
        """
        icae, origin = self._own(exact=True)
        return content_key(source_hash(icae.context_ids(context)), origin, icae.dtype)

    def delete(self, key: str) -> bool:
        """Remove an entry, even a damaged one, and return whether it existed; loaded memories stay usable."""
        return self._folder.delete(_checked(key))

    def keys(self) -> Iterator[str]:
        """Yield all keys in order; entries that other processes put or delete meanwhile may or may not be included."""
        return self._folder.keys()

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _checked(key) in self._folder

    def __len__(self) -> int:
        return len(self._folder)

    def clean(self, older_than: float = _WASTE_SECONDS) -> int:
        """Delete files left by killed processes, and return their number.

        Args:
            older_than: minimum age in seconds; younger files may belong to a `put` in progress.
        """
        return self._folder.clean(older_than)

    @staticmethod
    def rebuild(path: str | Path) -> list[str]:
        """Rebuild the index of a local store from the headers of its files.

        No other process may use the store meanwhile. Of several files with the same key the newest is kept. An entry
        reappears if its deletion was interrupted between index and file.

        Args:
            path: the folder of the store.

        Returns:
            Files that could not be read and are not in the index.

        Raises:
            InvalidInputError: the store is remote.
            StoreError: there is no such folder, or the index cannot be written.
        """
        local = _local_path(path)
        if local is None:
            raise InvalidInputError(f"{path} is remote, and a remote store has no index; there is nothing to rebuild")
        return rebuild(local)

    def close(self) -> None:
        """Close the index; loaded memories stay usable."""
        self._folder.close()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.inference_mode(False)
    def _read(self, key: str, *, whole: bool = True) -> MemoryFile:
        what, folder = f"entry {key!r} of the store {self._folder}", self._folder
        file = MemoryFile.read((folder.read if whole else folder.head)(_checked(key)), what, whole=whole)
        if file.header["key"] != key:
            raise CheckpointError(f"{what} holds another entry, {file.header['key']!r}; delete it and put it again")
        return file

    def _open(self, key: str) -> MemoryFile:
        """Return an entry's file if this model made it."""
        file, origin = self._read(key), self._current(exact=False)
        if origin is not None:
            origin.check(file.origin, file.what)
        return file

    def _current(self, *, exact: bool) -> Origin | None:
        return self._origin if self._tracker is None else self._tracker.current(exact=exact)

    def _own(self, *, exact: bool) -> tuple[ICAE, Origin]:
        icae = self._own_icae("compress")
        tracker = self._tracker or OriginTracker(icae)
        return icae, tracker.current(exact=exact)

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
    """Return the local folder of a path, or None for a remote address."""
    scheme, separator, rest = str(path).partition("://")
    if not separator:
        return Path(path).expanduser()
    return Path(rest).expanduser() if scheme in ("file", "local") else None
