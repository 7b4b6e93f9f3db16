"""A memory store in a local folder: one immutable file per entry, and an index of the valid files."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from filelock import FileLock

from icae_fast.errors import CheckpointError, MemoryNotFoundError, StoreError
from icae_fast.io.files import map_file, sync_folder, write_atomically
from icae_fast.store.index import Index, create_index
from icae_fast.store.memory_file import MemoryFile

INDEX_FILE = "index.sqlite"
SUFFIX = ".safetensors"
_SUBFOLDERS = "[0-9a-f]" * 2

log = logging.getLogger(__name__)


class LocalFolder:
    """Entries as bytes, by key.

    A put writes a file under a name that is never reused, syncs it, and then sets the index to it. A reader therefore
    never sees a partial file, no matter when a writer is killed, and two writers of the same key cannot delete each
    other's file. Files without a row in the index are waste, which `clean` deletes.

    Args:
        root: the folder.
        create: create the store if there is none.

    Raises:
        StoreError: there is no store, or it cannot be used.
    """

    def __init__(self, root: Path, create: bool) -> None:
        self.root = root
        path = root / INDEX_FILE
        if not path.exists():
            if not create:
                raise StoreError(f"there is no memory store in {root}; check the path")
            self._create(path)
        self.index = Index(path)

    def _create(self, path: Path) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with _locked(self.root):
                if path.exists():
                    return
                if any(self.root.glob(f"{_SUBFOLDERS}/*{SUFFIX}")):
                    raise StoreError(
                        f"{self.root} has entries but no {INDEX_FILE}; make it again with MemoryStore.rebuild(path)"
                    )
                create_index(path)
        except StoreError:
            raise
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot make a memory store in {self.root}: {error}; choose a local folder") from error

    def __str__(self) -> str:
        return str(self.root)

    def read(self, key: str) -> torch.Tensor:
        """Map an entry and return its bytes, (size,) uint8.

        Raises:
            MemoryNotFoundError: there is no such entry.
            CheckpointError: its file is missing or cannot be opened.
        """
        tried: Path | None = None
        while True:
            path = self._path(key)
            try:
                return map_file(path)
            except FileNotFoundError as error:
                if path == tried:
                    raise CheckpointError(
                        f"entry {key!r} of the store {self.root}: its file {path} is missing; "
                        "delete the entry and compress its text again"
                    ) from error
                tried = path  # replaced or deleted after the index was read
            except OSError as error:
                raise CheckpointError(
                    f"entry {key!r} of the store {self.root} cannot be read: {error}; check the file's permissions"
                ) from error

    def _path(self, key: str) -> Path:
        file = self.index.file_of(key)
        if file is None:
            raise MemoryNotFoundError(f"the store {self.root} has no entry {key!r}; see its keys()")
        return self.root / file

    def write(self, entries: Mapping[str, bytes | bytearray]) -> None:
        """Put entries, either all or none; they are on disk when this returns.

        Raises:
            StoreError: the folder cannot be written or is full.
        """
        rows = {}
        for key in entries:
            name = hashlib.sha256(key.encode()).hexdigest()[:32]
            rows[key] = f"{name[:2]}/{name}-{uuid.uuid4().hex[:16]}{SUFFIX}"
        try:
            folders = {self.root / file[:2] for file in rows.values()}
            for folder in folders:
                folder.mkdir(exist_ok=True)
            write_atomically({self.root / rows[key]: data for key, data in entries.items()}, new_names=True)
            for folder in (
                *folders,
                self.root,
            ):  # root too: another process may have created a subfolder without a sync yet
                sync_folder(folder)
        except OSError as error:
            raise StoreError(f"cannot write into the store {self.root}: {error}; free space or check it") from error
        # No rollback from here on: after a failure the index may have the rows; otherwise the files are waste.
        self._discard(*self.index.put(rows))

    def _discard(self, *files: str) -> None:
        for file in files:
            with contextlib.suppress(OSError):  # Windows cannot delete a mapped file; `clean` does later
                (self.root / file).unlink(missing_ok=True)

    def delete(self, key: str) -> bool:
        """Remove an entry and return whether it existed; mapped memories stay usable."""
        file = self.index.remove(key)
        if file is not None:
            self._discard(file)
        return file is not None

    def __contains__(self, key: str) -> bool:
        return self.index.file_of(key) is not None

    def __len__(self) -> int:
        return len(self.index)

    def keys(self) -> Iterator[str]:
        """Yield all keys in order."""
        return self.index.keys()

    def clean(self, older_than: float) -> int:
        """Delete files that are in no row of the index, and return their number.

        Args:
            older_than: minimum age in seconds.
        """
        limit, count = time.time() - older_than, 0
        for folder in sorted(self.root.glob(_SUBFOLDERS)):
            # List files before reading the index: then the index has every entry put in between.
            names = [(e.name, e.stat().st_mtime) for e in _entries(folder)]
            known = self.index.files_in(folder.name)
            unknown = [f"{folder.name}/{n}" for n, modified in names if modified < limit]
            unknown = [file for file in unknown if file not in known]
            self._discard(*unknown)
            count += len(unknown)
        return count

    def close(self) -> None:
        """Close the index."""
        self.index.close()


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                entry.stat()
                yield entry


def _locked(root: Path) -> FileLock:
    return FileLock(root / f"{INDEX_FILE}.lock")


def rebuild(root: Path) -> list[str]:
    """Rebuild a folder's index from its files; see `MemoryStore.rebuild`."""
    if not root.is_dir():
        raise StoreError(f"there is no folder {root}; check the path")
    rows: dict[str, tuple[float, str]] = {}
    unreadable: list[str] = []
    try:
        with _locked(root):
            for path in sorted(root.glob(f"{_SUBFOLDERS}/*{SUFFIX}")):
                file = f"{path.parent.name}/{path.name}"
                try:
                    header = MemoryFile.read(map_file(path), str(path)).header
                    found = header["created"], file
                    rows[header["key"]] = max(found, rows.get(header["key"], found))
                except CheckpointError as error:
                    log.warning("left out of the index: %s", error)
                    unreadable.append(file)
            for suffix in ("-wal", "-shm"):  # the old database's log must not be applied to the new one
                (root / (INDEX_FILE + suffix)).unlink(missing_ok=True)
            create_index(root / INDEX_FILE, {key: file for key, (_, file) in rows.items()})
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot rebuild the index of {root}: {error}; check the folder") from error
    return unreadable
