"""Files of a store's index: made, replaced and opened so that no moment loses a row.

SQLite keeps a log (`-wal`) and shared memory (`-shm`) beside a database. Their names follow from the database's, so the
log of an index that is gone would be applied to a new one: it is deleted when no index has its name, before a new one
gets it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from icae_fast.io.files import sync_folder

INDEX_FILE = "index.sqlite"
VERSION = 1
APPLICATION = 0x49434145  # "ICAE", identifies the database for `file` and for this package
SCHEMA = (
    "CREATE TABLE entries (key TEXT PRIMARY KEY, file TEXT NOT NULL) WITHOUT ROWID",
    "CREATE UNIQUE INDEX entries_by_file ON entries (file)",
)
BUSY_SECONDS = 30.0
_SIDES = ("-wal", "-shm")
# The first is enough to open the index and delete many entries, the last for a deletion in an open index.
_RESERVE, _RESERVE_BYTES = f"{INDEX_FILE}.reserve", (128 << 10, 64 << 10, 32 << 10, 16 << 10)
_TEMPORARY = re.compile(rf"\.{re.escape(INDEX_FILE)}\.[0-9a-f]{{32}}(-wal|-shm|-journal)?")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{INDEX_FILE}.{uuid.uuid4().hex}")


def side_files(path: Path) -> list[Path]:
    """Return the paths of the log and the shared memory of a database."""
    return [path.with_name(path.name + suffix) for suffix in _SIDES]


def install_index(path: Path, rows: Mapping[str, str]) -> None:
    """Write a new index, and put it in the place of a damaged one if there is one.

    The new index is complete on the disk before anything of the old one is touched. Between two steps there may be no
    index, which the store reports, and never one that lacks rows.

    Args:
        path: the index, which must not be in use.
        rows: file of each key.

    Raises:
        OSError, sqlite3.Error: the index cannot be written.
    """
    new, old = _temporary(path), _temporary(path)
    try:
        with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN")
            for statement in SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.executemany("INSERT INTO entries VALUES (?, ?)", rows.items())
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode = WAL")
        sync_folder(path.parent)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, old)
            sync_folder(path.parent)
        for side in side_files(path):
            side.unlink(missing_ok=True)
        sync_folder(path.parent)
        os.replace(new, path)
        sync_folder(path.parent)
    finally:
        for temporary in (new, old):
            for file in (temporary, *side_files(temporary), temporary.with_name(f"{temporary.name}-journal")):
                file.unlink(missing_ok=True)


def delete_leftovers(root: Path, older_than: float) -> int:
    """Delete files of indexes that were not finished, and return their number.

    Args:
        root: folder of the store.
        older_than: minimum age in seconds.
    """
    count, limit = 0, time.time() - older_than
    with os.scandir(root) as entries:
        found = [entry for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for entry in found:
        with contextlib.suppress(FileNotFoundError):
            state = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(state.st_mode) and state.st_mtime < limit:
                os.unlink(entry.path)
                count += 1
    return count


def keep_reserve(root: Path) -> None:
    """Occupy the space that a deletion needs on a full disk, or as much of it as there is."""
    path, temporary = root / _RESERVE, _temporary(root / INDEX_FILE)
    for size in _RESERVE_BYTES:
        try:
            if path.exists() and path.stat().st_size >= size:
                return
            temporary.write_bytes(os.urandom(size))  # zeros take no space on some disks
            os.replace(temporary, path)
            return
        except OSError:
            temporary.unlink(missing_ok=True)


def release_reserve(root: Path) -> bool:
    """Free the space of `keep_reserve` and return whether there was any."""
    try:
        (root / _RESERVE).unlink()
    except OSError:
        return False
    return True


def is_writable(path: Path) -> bool:
    """Return whether a database can be written; SQLite must be able to create files beside it, too."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def connect(path: Path) -> sqlite3.Connection:
    """Open a database for reading and writing; it must exist."""
    return _connect(path, "mode=rw")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?{mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None,
        check_same_thread=False,
    )  # fmt: skip
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # opens the log and the shared memory
    except BaseException:
        connection.close()
        raise
    return connection


def state_of(path: Path) -> tuple[Any, ...]:
    """Return what changes when another process writes a database that this one can only read."""
    states = []
    for file in (path, *side_files(path)[:1]):
        try:
            found = os.stat(file)
            states.append((found.st_ino, found.st_size, found.st_mtime_ns))
        except FileNotFoundError:
            states.append((0, 0, 0))
    return tuple(states)


def connect_read_only(path: Path) -> tuple[sqlite3.Connection, Callable[[], None]]:
    """Open a database in a folder that cannot be written.

    Without a log the database is complete and SQLite needs no other file. With a log and its shared memory, of a writer
    that sees the folder otherwise or of a killed one, SQLite can read both. With a log alone, which a copy of a folder
    may have, SQLite would create the shared memory, so the two files are copied into a temporary folder.

    Returns:
        The connection, and a function that frees what else was made; call it after closing the connection.

    Raises:
        OSError, sqlite3.Error: the database cannot be read.
    """
    log = side_files(path)[0]
    if not log.exists() or log.stat().st_size == 0:
        return _connect(path, "mode=ro&immutable=1"), lambda: None
    try:
        return _connect(path, "mode=ro"), lambda: None
    except sqlite3.OperationalError:
        folder = tempfile.TemporaryDirectory(prefix="icae-fast-")
        for file in (path, log):
            shutil.copyfile(file, Path(folder.name) / file.name)
        return _connect(Path(folder.name) / path.name, "mode=rw"), folder.cleanup
