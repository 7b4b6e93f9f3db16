"""Files of a local store: the names that it writes, opened relative to its folder and without following links.

The index and the folder may have been written by somebody else, so a name from there is only used if it is one that the
store itself gives, and a link is never followed: neither one in the place of an entry nor one in the place of a
subfolder. The folder of the store may be a link.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from icae_fast.io.files import map_file, sync_folder

SUFFIX = ".safetensors"
_NAME = rf"([0-9a-f]{{32}})-[0-9a-f]{{16}}{re.escape(SUFFIX)}"
_ENTRY = re.compile(_NAME)
_TEMPORARY = re.compile(rf"\.{_NAME}\.[0-9a-f]{{32}}")
_SUBFOLDER = re.compile(r"[0-9a-f]{2}")

_RELATIVE = {os.open, os.unlink, os.rename} <= os.supports_dir_fd and os.scandir in os.supports_fd
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# Opening a pipe must not wait for its other end; descriptors are not for child processes; bytes stay bytes.
_SAFE = _NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def new_file(key: str) -> str:
    """Return a name that was never used for a file of a key, relative to the store, "ab/ab...-....safetensors"."""
    digest = _digest(key)
    return f"{digest[:2]}/{digest}-{uuid.uuid4().hex[:16]}{SUFFIX}"


def is_file_of(key: str, file: object) -> bool:
    """Return whether the store itself would give a file of this key such a name."""
    if not isinstance(file, str):
        return False
    folder, _, name = file.partition("/")
    match = _ENTRY.fullmatch(name)
    return match is not None and match[1] == _digest(key) and folder == match[1][:2]


def _belongs(folder: str, name: str, pattern: re.Pattern[str]) -> bool:
    match = pattern.fullmatch(name)
    return match is not None and match[1][:2] == folder


class _Subfolder:
    """An open subfolder. Without `dir_fd` (Windows) its files are opened by their paths.

    Args:
        path: of the subfolder.
        descriptor: of the subfolder, or None.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._path, self._descriptor = path, descriptor

    def _at(self, name: str) -> tuple[str, dict[str, Any]]:
        if self._descriptor is None:
            return str(self._path / name), {}
        return name, {"dir_fd": self._descriptor}

    def open(self, name: str, flags: int) -> int:
        """Open a file and return its descriptor; a link is an OSError."""
        path, at = self._at(name)
        if not at and os.path.islink(path):
            raise OSError(errno.ELOOP, "a link stands in the place of the file")
        return os.open(path, flags | _SAFE, 0o666, **at)

    def unlink(self, name: str) -> None:
        """Delete a file."""
        path, at = self._at(name)
        os.unlink(path, **at)

    def rename(self, name: str, target: str) -> None:
        """Rename a file within this subfolder, replacing any other."""
        (source, at), (destination, _) = self._at(name), self._at(target)
        if at:
            os.rename(source, destination, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        else:
            os.replace(source, destination)

    def files(self) -> Iterator[tuple[str, float]]:
        """Yield name and time of change of each regular file; those deleted meanwhile are left out."""
        with os.scandir(self._path if self._descriptor is None else self._descriptor) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        yield entry.name, found.st_mtime

    def sync(self) -> None:
        """Flush the names to disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)


class Folder:
    """The files of a store.

    Args:
        root: the folder of the store.

    Raises:
        OSError: a file or folder cannot be used, or is a link. All methods raise it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[_Subfolder]:
        path = self.root / name
        if not _RELATIVE:
            if path.is_symlink():
                raise _link(path)
            yield _Subfolder(path, None)
            return
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _SAFE)
        except OSError as error:
            if path.is_symlink():
                raise _link(path) from error
            raise
        try:
            yield _Subfolder(path, descriptor)
        finally:
            os.close(descriptor)

    def subfolders(self) -> list[str]:
        """Return the names of the subfolders that the store has made, without links."""
        with os.scandir(self.root) as entries:
            return sorted(e.name for e in entries if _SUBFOLDER.fullmatch(e.name) and e.is_dir(follow_symlinks=False))

    def map(self, file: str) -> torch.Tensor:
        """Map a file of the store and return its bytes, (size,) uint8; see `icae_fast.io.files.map_file`.

        Args:
            file: a name for which `is_file_of` holds.
        """
        folder, _, name = file.partition("/")
        with self._opened(folder) as opened:
            descriptor = opened.open(name, os.O_RDONLY)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            return _map(descriptor, self.root / file)
        finally:
            os.close(descriptor)

    def write(self, files: Mapping[str, bytes | bytearray]) -> None:
        """Write files under temporary names, sync them, and rename all when all are written; then they are on disk.

        Args:
            files: content by name; names from `new_file`.

        Raises:
            OSError: as for all methods; then no temporary file remains.
        """
        with contextlib.ExitStack() as stack:
            folders: dict[str, _Subfolder] = {}
            for name in {file[:2] for file in files}:
                with contextlib.suppress(FileExistsError):
                    (self.root / name).mkdir()
                folders[name] = stack.enter_context(self._opened(name))
            places = [(folders[f[:2]], f[3:], f".{f[3:]}.{uuid.uuid4().hex}", data) for f, data in files.items()]
            try:
                for folder, _, temporary, data in places:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                    with os.fdopen(folder.open(temporary, flags), "wb") as opened:
                        opened.write(data)
                        opened.flush()
                        os.fsync(opened.fileno())
                for folder, name, temporary, _ in places:
                    folder.rename(temporary, name)
            except BaseException:
                for folder, _, temporary, _ in places:
                    with contextlib.suppress(OSError):
                        folder.unlink(temporary)
                raise
            for folder in folders.values():
                folder.sync()
        sync_folder(self.root)  # another process may have created a subfolder without a sync yet

    def delete(self, folder: str, names: list[str]) -> int:
        """Delete files of a subfolder as far as possible, and return how many are gone; one that is absent is none.

        A file that stays is left for `clean`: Windows cannot delete one that is mapped.
        """
        count = 0
        with contextlib.suppress(OSError), self._opened(folder) as opened:
            for name in names:
                with contextlib.suppress(OSError):
                    opened.unlink(name)
                    count += 1
        return count

    def entries(self, folder: str) -> list[tuple[str, float]]:
        """Return (name, time of change) of the entries in a subfolder, in the order of names."""
        with self._opened(folder) as opened:
            return sorted((name, t) for name, t in opened.files() if _belongs(folder, name, _ENTRY))

    def temporaries(self, folder: str) -> list[tuple[str, float]]:
        """Return (name, time of change) of the files in a subfolder that interrupted writes have left."""
        with self._opened(folder) as opened:
            return [(name, t) for name, t in opened.files() if _belongs(folder, name, _TEMPORARY)]


def _link(path: Path) -> OSError:
    return OSError(errno.ELOOP, "it is a link, which a store does not follow", str(path))


def _map(descriptor: int, path: Path) -> torch.Tensor:
    """Map an open file, so that it cannot be exchanged for another between its check and the mapping."""
    for name in (f"/proc/self/fd/{descriptor}", f"/dev/fd/{descriptor}"):
        if _RELATIVE and os.path.exists(name):
            return map_file(name)
    if not _RELATIVE:
        return map_file(path)
    with os.fdopen(os.dup(descriptor), "rb") as file:  # no /proc: read it
        data = bytearray(file.read())
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
