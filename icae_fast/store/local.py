"""A memory store in a local folder: one immutable file per entry, and an index of the valid files."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from filelock import FileLock

from icae_fast.errors import CheckpointError, MemoryNotFoundError, StoreError
from icae_fast.store.folder import Folder, is_file_of, new_file
from icae_fast.store.index import DamagedIndexError, Index
from icae_fast.store.index_files import INDEX_FILE, delete_leftovers, install_index
from icae_fast.store.memory_file import MemoryFile

log = logging.getLogger(__name__)


class LocalFolder:
    """Entries as bytes, by key.

    A put writes a file under a name that is never reused, syncs it, and then sets the index to it. A reader therefore
    never sees a partial file, no matter when a writer is killed, and two writers of the same key cannot delete each
    other's file. Files without a row in the index are waste, which `clean` deletes. A row is used only if it has a name
    that the store itself would give.

    Args:
        root: the folder.
        create: create the store if there is none.

    Raises:
        StoreError: there is no store, or it cannot be used.
    """

    def __init__(self, root: Path, create: bool) -> None:
        self.root, self._files = root, Folder(root)
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
                if any(self._files.entries(name) for name in self._files.subfolders()):
                    raise StoreError(
                        f"{self.root} has entries but no {INDEX_FILE}; make it again with MemoryStore.rebuild(path)"
                    )
                install_index(path, {})
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
        what, tried = f"entry {key!r} of the store {self.root}", ""
        while True:
            file = self._file(key)
            try:
                return self._files.map(file)
            except FileNotFoundError as error:
                if file == tried:
                    raise CheckpointError(
                        f"{what}: its file {self.root / file} is missing; delete the entry and compress its text again"
                    ) from error
                tried = file  # replaced or deleted after the index was read
            except OSError as error:
                raise CheckpointError(f"{what} cannot be read: {error}; check the file and its permissions") from error

    head = read  # a mapped file is read page by page

    def _file(self, key: str) -> str:
        file = self.index.file_of(key)
        if file is None:
            raise MemoryNotFoundError(f"the store {self.root} has no entry {key!r}; see its keys()")
        if not is_file_of(key, file):
            raise CheckpointError(
                f"entry {key!r} of the store {self.root}: the index names {file!r}, which is no file of this entry; "
                "delete the entry, or make the index again with MemoryStore.rebuild(path)"
            )
        return file

    def write(self, entries: Mapping[str, bytes | bytearray]) -> None:
        """Put entries, either all or none; they are on disk when this returns.

        Raises:
            StoreError: the folder cannot be written or is full.
        """
        rows = {key: new_file(key) for key in entries}
        try:
            self._files.write({rows[key]: data for key, data in entries.items()})
        except OSError as error:
            raise StoreError(
                f"cannot write into the store {self.root}: {error}; free space or check the folder"
            ) from error
        # No rollback from here on: after a failure the index may have the rows; otherwise the files are waste.
        for key, file in self.index.put(rows):
            self._discard(key, file)

    def _discard(self, key: str, file: str) -> None:
        if is_file_of(key, file):
            self._files.delete(file[:2], [file[3:]])

    def delete(self, key: str) -> bool:
        """Remove an entry and return whether it existed; mapped memories stay usable. This works on a full disk."""
        file = self.index.remove(key)
        if file is not None:
            self._discard(key, file)
            self.index.keep_reserve()
        return file is not None

    def __contains__(self, key: str) -> bool:
        return self.index.file_of(key) is not None

    def __len__(self) -> int:
        return len(self.index)

    def keys(self) -> Iterator[str]:
        """Yield all keys in order."""
        return self.index.keys()

    def clean(self, older_than: float) -> int:
        """Delete files of the store that are in no row of the index, and return their number.

        Args:
            older_than: minimum age in seconds.

        Raises:
            StoreError: the folder cannot be read.
        """
        limit, count = time.time() - older_than, 0
        try:
            for folder in self._files.subfolders():
                # List files before reading the index: then the index has every entry put in between.
                entries, unfinished = self._files.entries(folder), self._files.temporaries(folder)
                known = self.index.files_in(folder)
                waste = [n for n, t in entries if t < limit and f"{folder}/{n}" not in known]
                waste += [n for n, t in unfinished if t < limit]
                count += self._files.delete(folder, waste)
            count += delete_leftovers(self.root, older_than)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"cannot clean the store {self.root}: {error}; check its permissions") from error
        self.index.keep_reserve()
        return count

    def close(self) -> None:
        """Close the index."""
        self.index.close()


def _locked(root: Path) -> FileLock:
    """Return the lock under which an index is made; release it with the context."""
    return FileLock(root / f"{INDEX_FILE}.lock")


def rebuild(root: Path) -> list[str]:
    """Rebuild a folder's index from its files; see `MemoryStore.rebuild`.

    The rows of an intact index are replaced in one transaction. A damaged or lost index is replaced by a new one, which
    is complete before.
    """
    if not root.is_dir():
        raise StoreError(f"there is no folder {root}; check the path")
    path = root / INDEX_FILE
    try:
        with _locked(root):
            delete_leftovers(root, 0.0)
            try:
                if path.exists():
                    return _rewrite(Index(path), root)
            except DamagedIndexError as error:
                log.warning("%s", error)
            rows, unreadable = _rows(root)
            install_index(path, rows)
            return unreadable
    except StoreError:
        raise
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot rebuild the index of {root}: {error}; check the folder and free space") from error


def _rewrite(index: Index, root: Path) -> list[str]:
    try:
        with index.writing() as connection:
            rows, unreadable = _rows(root)
            index.replace_all(connection, rows)
        return unreadable
    finally:
        index.close()


def _rows(root: Path) -> tuple[dict[str, str], list[str]]:
    """Return the newest file of each key, and the files that cannot be read."""
    newest: dict[str, tuple[float, str]] = {}
    unreadable: list[str] = []
    folder = Folder(root)
    for name in folder.subfolders():
        for file in (f"{name}/{entry}" for entry, _ in folder.entries(name)):
            try:
                header = MemoryFile.read(folder.map(file), str(root / file)).header
                key = header["key"]
                if not (isinstance(key, str) and is_file_of(key, file)):
                    raise CheckpointError(f"{root / file} holds another entry, {key!r}")
                found = float(header["created"] or 0), file
                newest[key] = max(found, newest.get(key, found))
            except CheckpointError as error:  # an OSError ends the rebuild: the file may be intact
                log.warning("left out of the index: %s", error)
                unreadable.append(file)
    return {key: file for key, (_, file) in newest.items()}, unreadable
