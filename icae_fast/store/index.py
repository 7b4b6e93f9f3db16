"""SQLite index of a local memory store: the file of each key."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from icae_fast.errors import StoreError
from icae_fast.store.index_files import (
    APPLICATION,
    BUSY_SECONDS,
    SCHEMA,
    VERSION,
    connect,
    connect_read_only,
    is_writable,
    keep_reserve,
    release_reserve,
    state_of,
)

_PAGE = 1000  # keys per query, so that memory is bounded and no read transaction stays open between pages
_REBUILD = "make it again from the entries with MemoryStore.rebuild(path)"


class DamagedIndexError(StoreError):
    """The index is damaged, and can be made again from the entries."""


class Index:
    """Map from keys to files, for any number of threads and processes.

    WAL mode lets readers continue during a write. `synchronous = FULL` syncs each commit, so that a completed `put`
    survives a power cut; NORMAL would survive only a crash of the process, and save one sync of three. SQLite's locks
    do not survive a fork, and a forked process would take the locks of its parent for its own: connections are closed
    before a fork, and both processes open new ones.

    In a folder that cannot be written, the index is opened for reading, and opened again when it has changed.

    Args:
        path: the database, which must exist.

    Raises:
        DamagedIndexError: the database is damaged. All methods raise it.
        StoreError: the database is of another kind, locked for more than 30 s, or on a full disk. All methods raise it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._process: int | None = None
        self._connection: sqlite3.Connection | None = None
        self._inherited: list[sqlite3.Connection] = []
        self._seen: tuple[Any, ...] | None = None  # of a database that can only be read
        self._release: Callable[[], None] = lambda: None
        if path.is_symlink():
            raise StoreError(f"the index {path} is a link, which a store does not follow; put the file in its place")
        _open_indexes.add(self)
        with self._connected() as connection:
            self._check(connection)

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.path,)

    def _check(self, connection: sqlite3.Connection) -> None:
        found = (connection.execute(f"PRAGMA {n}").fetchone()[0] for n in ("application_id", "user_version"))
        application, version = found
        schema = [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master ORDER BY rowid")]
        if not schema:
            raise DamagedIndexError(f"the index {self.path} is empty; {_REBUILD}")
        if application != APPLICATION:
            raise StoreError(f"{self.path} is no index of a memory store; choose another folder")
        if version > VERSION:
            raise StoreError(f"{self.path} has version {version}; install a newer icae-fast to read it")
        if schema != list(SCHEMA):  # a view or a trigger would run what somebody else has written
            raise DamagedIndexError(f"the index {self.path} has other tables than a store makes; {_REBUILD}")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if self._process != os.getpid():
            # A fork that Python did not see. Keep the old connection: closing it would release the parent's locks.
            if self._connection is not None:
                self._inherited.append(self._connection)
            self._process, self._connection, self._lock = os.getpid(), None, threading.Lock()
        with self._lock:
            try:
                if self._seen is not None and self._seen != state_of(self.path):
                    self._disconnect()
                yield self._connection or self._connect()
            except (sqlite3.Error, UnicodeError) as error:
                damaged, remedy = _remedy(error)
                kind = DamagedIndexError if damaged else StoreError
                raise kind(f"the index {self.path}: {error}; {remedy}") from error

    def _connect(self) -> sqlite3.Connection:
        if is_writable(self.path):
            try:
                self._connection = connect(self.path)
            except sqlite3.OperationalError as error:
                if not (_is_full(error) and release_reserve(self.path.parent)):
                    raise
                self._connection = connect(self.path)
            keep_reserve(self.path.parent)
            return self._connection
        seen = state_of(self.path)
        try:
            self._connection, self._release = connect_read_only(self.path)
        except OSError as error:
            raise StoreError(f"the index {self.path} cannot be read: {error}; check its permissions") from error
        self._seen = seen
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._release()
        self._connection, self._seen, self._release = None, None, lambda: None

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that has the write lock from its start, so that its reads stay valid until the commit."""
        with self._connected() as connection:
            if self._seen is not None:
                raise StoreError(f"the index {self.path} cannot be written; check the permissions of file and folder")
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

    def put(self, rows: Mapping[str, str]) -> list[tuple[str, str]]:
        """Set the files of keys, either all or none, and return the (key, file) pairs that they replace."""
        replaced: list[tuple[str, str]] = []
        with self.writing() as connection:
            for key, file in rows.items():
                query = "SELECT key, file FROM entries WHERE key = ?"
                replaced += connection.execute(query, (key,)).fetchall()
                connection.execute("REPLACE INTO entries VALUES (?, ?)", (key, file))
        return replaced

    def remove(self, key: str) -> str | None:
        """Remove a key and return its file, or None if there was none; works on a full disk."""
        try:
            return self._remove(key)
        except StoreError as error:
            if not _is_full(error.__cause__):
                raise
        # The reserve gives SQLite the space for its log. A log that was written back is used again from its start, and
        # keeps its size, so that further deletions need no space.
        release_reserve(self.path.parent)
        with contextlib.suppress(StoreError), self._connected() as connection:
            connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        return self._remove(key)

    def _remove(self, key: str) -> str | None:
        with self.writing() as connection:
            row = connection.execute("SELECT file FROM entries WHERE key = ?", (key,)).fetchone()
            connection.execute("DELETE FROM entries WHERE key = ?", (key,))
        return row and row[0]

    def replace_all(self, connection: sqlite3.Connection, rows: Mapping[str, str]) -> None:
        """Replace all rows within a transaction of `writing`.

        Raises:
            sqlite3.DatabaseError: the database is damaged.
        """
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"malformed: {found}")
        connection.execute("DELETE FROM entries")
        connection.executemany("INSERT INTO entries VALUES (?, ?)", rows.items())

    def keys(self) -> Iterator[str]:
        """Yield all keys in order; keys put or removed meanwhile may or may not be included."""
        where, last = "", tuple[str, ...]()
        while True:
            with self._connected() as connection:
                query = f"SELECT key FROM entries WHERE typeof(key) = 'text' {where} ORDER BY key LIMIT {_PAGE}"
                page = [key for (key,) in connection.execute(query, last)]
            if not page:
                return
            yield from page
            where, last = "AND key > ?", (page[-1],)

    def files_in(self, folder: str) -> set[str]:
        """Return the files of all entries in a subfolder, relative to the store, e.g. "ab/name"."""
        with self._connected() as connection:  # "0" follows "/" in the order of characters
            query = "SELECT file FROM entries WHERE file >= ? AND file < ?"
            return {file for (file,) in connection.execute(query, (f"{folder}/", f"{folder}0"))}

    def __len__(self) -> int:
        with self._connected() as connection:
            return int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])

    def keep_reserve(self) -> None:
        """Occupy the space that the next deletion on a full disk needs."""
        if is_writable(self.path):
            keep_reserve(self.path.parent)

    def close(self) -> None:
        """Close the connection; the next use opens a new one."""
        if self._process == os.getpid() and self._connection is not None:
            with self._lock:
                self._disconnect()
            self.keep_reserve()

    def _before_fork(self) -> bool:
        """Close the connection and keep the lock; return whether the lock could be taken."""
        taken = self._lock.acquire(timeout=BUSY_SECONDS)
        if taken and self._process == os.getpid():
            with contextlib.suppress(sqlite3.Error):
                self._disconnect()
        return taken

    def _after_fork(self) -> None:
        self._lock.release()


_open_indexes: weakref.WeakSet[Index] = weakref.WeakSet()
_paused: list[Index] = []
_forking = threading.Lock()


def _pause() -> None:
    _forking.acquire()
    _paused.extend(index for index in list(_open_indexes) if index._before_fork())


def _resume() -> None:
    while _paused:
        _paused.pop()._after_fork()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_pause, after_in_parent=_resume, after_in_child=_resume)


def _is_full(error: BaseException | None) -> bool:
    # "disk I/O error": there was no space for the shared memory
    return isinstance(error, sqlite3.Error) and ("is full" in str(error) or "disk I/O error" in str(error))


def _remedy(error: Exception) -> tuple[bool, str]:
    """Return whether the index is damaged, and what to do about an error of SQLite."""
    text = str(error)
    if "locked" in text:
        return False, f"another process has locked it for over {BUSY_SECONDS:.0f} s; end that process"
    if _is_full(error):
        return False, "free space on the disk; deleting entries works on a full one"
    if "readonly" in text or "unable to open" in text:
        return False, "check that the folder exists, that you may use it, and that its disk has space"
    return True, _REBUILD
