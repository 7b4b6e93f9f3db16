"""A JSONL file that grows by whole lines and can be continued after its writer was killed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from icae_fast.errors import OutputError

_LONGEST_NAME = 255  # bytes of a file name, on nearly every file system


def _lock_name(name: str) -> str:
    """Return the name of a file's lock, `.NAME.lock`, or a hash where that is too long."""
    lock, encoded = f".{name}.lock", os.fsencode(name)
    return lock if len(os.fsencode(lock)) <= _LONGEST_NAME else f".{hashlib.sha256(encoded).hexdigest()}.lock"


class LineFile:
    """A file to which lines are appended, each by one write; used in a `with` block.

    A failed write is undone. Only one process writes at a time: it locks a file (see `_lock_name`) in the same
    folder. A new file without a line is deleted again.

    Args:
        path: the file; its folder must exist.

    Attributes:
        cut: bytes of a half-written last line that `read` removed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.cut = 0
        self._lock = FileLock(self.path.with_name(_lock_name(self.path.name)))
        self._descriptor = -1
        self._size = 0

    def resume(self, accept: Callable[[int, bytes], bool]) -> None:
        """Open the file and `read` it; an exception from `accept` closes it again."""
        self.__enter__()
        try:
            self.read(accept)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> LineFile:
        """Open the file; call `read` next.

        Raises:
            OutputError: it cannot be opened for writing, or another process is writing it.
        """
        if not self.path.parent.is_dir():
            raise OutputError(f"{self.path.parent} is not a folder; create it first")
        if os.path.exists(self.path) and not self.path.is_file():  # False for a name that is too long
            raise OutputError(f"{self.path} is not a regular file; give another output")
        try:
            self._lock.acquire(timeout=0)
            # O_BINARY keeps Windows from changing line ends, which would shift the offsets.
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(self.path, flags, 0o666)
        except Timeout as error:
            raise OutputError(f"another process is writing {self.path}; wait for it, or give another output") from error
        except OSError as error:
            self.__exit__()
            raise OutputError(f"cannot write {self.path} ({error.strerror}); give another output") from error
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if self._size == 0 and self.path.stat().st_size == 0:
                self.path.unlink()
        self._lock.release()

    def read(self, accept: Callable[[int, bytes], bool]) -> None:
        """Read the existing lines.

        Args:
            accept: called with the number, from 1, and the bytes of each line; returns whether the line is complete. An
                incomplete last line without a line end is removed; a complete one gets its line end, which an editor or
                the kill took away. An exception from `accept` leaves the file unchanged.
        """
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                whole = accept(number, line)
                if line.endswith(b"\n"):
                    self._size += len(line)
                elif whole:
                    self._size += len(line) + os.write(self._descriptor, b"\n")
                    return  # the loop would read the line end just written as a line
                else:
                    self.cut = len(line)
                    os.ftruncate(self._descriptor, self._size)

    def append(self, line: str) -> None:
        """Write one line, given without its line end.

        Raises:
            OutputError: it cannot be written, for example because the disk is full; the file then ends with the
                previous line.
        """
        data = (line + "\n").encode()
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
        except BaseException as error:
            os.ftruncate(self._descriptor, self._size)
            if not isinstance(error, OSError):
                raise
            raise OutputError(
                f"cannot write {self.path} ({error.strerror}); its lines are complete: free space and run the same "
                "command again to continue"
            ) from error
        self._size += len(data)
