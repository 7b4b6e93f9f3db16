"""SQLite index of a local memory store: the file of each key."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from icae_fast.errors import StoreError
from icae_fast.io.files import sync_folder

VERSION = 1
_APPLICATION = 0x49434145  # "ICAE", identifies the database for `file` and for this module
_SCHEMA = (
    "CREATE TABLE entries (key TEXT PRIMARY KEY, file TEXT NOT NULL) WITHOUT ROWID",
    "CREATE UNIQUE INDEX entries_by_file ON entries (file)",
)
_BUSY_SECONDS = 30.0
_PAGE = 1000  # keys per query, so that memory is bounded and no read transaction stays open between pages


def create_index(path: Path, rows: Mapping[str, str] | None = None) -> None:
    """Write a new index atomically, replacing any older one, which must not be in use.

    Args:
        path: the database.
        rows: file of each key.

    Raises:
        OSError, sqlite3.Error: the index cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.executemany("INSERT INTO entries VALUES (?, ?)", (rows or {}).items())
            connection.execute("COMMIT")
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class Index:
    """Map from keys to files, for any number of threads and processes.

    WAL mode lets readers continue during a write. `synchronous = FULL` syncs each commit, so that a completed `put`
    survives a power cut; NORMAL would survive only a crash of the process, and save one sync of three. A connection
    is used only in the process that opened it, because SQLite's locks do not survive a fork.

    Args:
        path: the database, which must exist.

    Raises:
        StoreError: the database is damaged, of another kind, or locked for more than 30 s. All methods raise it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._process: int | None = None
        self._connection: sqlite3.Connection | None = None
        self._inherited: list[sqlite3.Connection] = []
        with self._connected() as connection:
            found = (connection.execute(f"PRAGMA {n}").fetchone()[0] for n in ("application_id", "user_version"))
            application, version = found
        if application != _APPLICATION:
            raise StoreError(f"{path} is no index of a memory store; choose another folder")
        if version > VERSION:
            raise StoreError(f"{path} has version {version}; install a newer icae-fast to read it")

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.path,)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if self._process != os.getpid():
            # Keep the old connection: closing it here would release the parent's locks and change its log.
            if self._connection is not None:
                self._inherited.append(self._connection)
            self._process, self._connection, self._lock = os.getpid(), None, threading.Lock()
        with self._lock:
            try:
                if self._connection is None:
                    # mode=rw: do not create an empty database if the file was deleted
                    self._connection = sqlite3.connect(
                        f"file:{quote(str(self.path))}?mode=rw", uri=True, timeout=_BUSY_SECONDS, isolation_level=None,
                        check_same_thread=False,
                    )  # fmt: skip
                    self._connection.execute("PRAGMA synchronous = FULL")
                yield self._connection
            except sqlite3.Error as error:
                raise StoreError(f"the index {self.path}: {error}; {_remedy(error)}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that has the write lock from its start, so that its reads stay valid until the commit."""
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def file_of(self, key: str) -> str | None:
        """Return the file of a key, or None."""
        with self._connected() as connection:
            row = connection.execute("SELECT file FROM entries WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def put(self, rows: Mapping[str, str]) -> list[str]:
        """Set the files of keys, either all or none, and return the files that they replace."""
        replaced: list[tuple[str]] = []
        with self._writing() as connection:
            for key, file in rows.items():
                replaced += connection.execute("SELECT file FROM entries WHERE key = ?", (key,)).fetchall()
                connection.execute("REPLACE INTO entries VALUES (?, ?)", (key, file))
        return [file for (file,) in replaced]

    def remove(self, key: str) -> str | None:
        """Remove a key and return its file, or None if there was none."""
        with self._writing() as connection:
            row = connection.execute("SELECT file FROM entries WHERE key = ?", (key,)).fetchone()
            connection.execute("DELETE FROM entries WHERE key = ?", (key,))
        return row and row[0]

    def keys(self) -> Iterator[str]:
        """Yield all keys in order; keys put or removed meanwhile may or may not be included."""
        where, last = "", tuple[str, ...]()
        while True:
            with self._connected() as connection:
                query = f"SELECT key FROM entries {where} ORDER BY key LIMIT {_PAGE}"
                page = [key for (key,) in connection.execute(query, last)]
            if not page:
                return
            yield from page
            where, last = "WHERE key > ?", (page[-1],)

    def files_in(self, folder: str) -> set[str]:
        """Return the files of all entries in a subfolder, relative to the store, e.g. "ab/name"."""
        with self._connected() as connection:  # "0" follows "/" in the order of characters
            query = "SELECT file FROM entries WHERE file >= ? AND file < ?"
            return {file for (file,) in connection.execute(query, (f"{folder}/", f"{folder}0"))}

    def __len__(self) -> int:
        with self._connected() as connection:
            return int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])

    def close(self) -> None:
        """Close the connection; the next use opens a new one."""
        if self._connection is not None and self._process == os.getpid():
            with self._lock:
                self._connection.close()
                self._connection = None


def _remedy(error: sqlite3.Error) -> str:
    if "locked" in str(error):
        return f"another process has locked it for over {_BUSY_SECONDS:.0f} s; end that process"
    if "full" in str(error) or "readonly" in str(error) or "unable to open" in str(error):
        return "free space, and check that the folder exists and is writable"
    return "make it again from the entries with MemoryStore.rebuild(path)"
