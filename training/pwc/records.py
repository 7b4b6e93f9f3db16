"""The output: a JSONL file that grows by whole records and can be taken up again."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from icae_fast.errors import InvalidInputError, OutputError
from training.pwc.prompts import QUESTION, shorten

_FIELDS = ("id", "input", "prompt", "answer", "kind", "origin", "teacher")
_START = b'{"id": "'  # how every record begins, so that a foreign line is not taken for half of one


class RecordFile:
    """Records appended to a JSONL file, each in one write; use it in a `with`.

    What a killed run left of a last record is cut off; a write that fails is taken back. One process writes at a
    time: the file beside it, `.NAME.lock`, is locked meanwhile. A new file without a record is deleted again.

    Attributes:
        path: the file.
        ids: of the records that it holds.
        cut: bytes of a half-written record that were cut off on opening.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ids: set[str] = set()
        self.cut = 0
        self._questions: dict[str, list[str]] = defaultdict(list)
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        self._descriptor = -1
        self._size = 0

    def __enter__(self) -> RecordFile:
        """Open the file and read the records that are there.

        Raises:
            OutputError: it cannot be opened for writing, or another process is writing it.
            InvalidInputError: it holds something else than records of this command.
        """
        if not self.path.parent.is_dir():
            raise OutputError(f"{self.path.parent} is no folder; make it first")
        if self.path.exists() and not self.path.is_file():
            raise OutputError(f"{self.path} is not a plain file; give another output")
        try:
            self._lock.acquire(timeout=0)
            # O_BINARY keeps Windows from writing other line ends, which would upset the offsets.
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(self.path, flags, 0o666)
        except Timeout as error:
            raise OutputError(f"another process is writing {self.path}; wait for it, or give another output") from error
        except OSError as error:
            self.__exit__()
            raise OutputError(f"cannot write {self.path} ({error.strerror}); give another output") from error
        try:
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if self._size == 0 and self.path.stat().st_size == 0:
                self.path.unlink()
        self._lock.release()

    def questions(self, passage_key: str) -> list[str]:
        """The questions about a passage that have their records."""
        return self._questions.get(passage_key, [])

    def append(self, record: dict[str, Any]) -> None:
        """Write one record.

        Args:
            record: id, input, prompt, answer, kind, origin and teacher, all strings.

        Raises:
            OutputError: it cannot be written, for want of room, say; the file ends with the record before it.
        """
        record = {field: record[field] for field in _FIELDS}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._descriptor, left) :]
        except BaseException as error:
            os.ftruncate(self._descriptor, self._size)
            if not isinstance(error, OSError):
                raise
            raise OutputError(
                f"cannot write {self.path} ({error.strerror}) after {len(self.ids)} records, which are whole; make "
                "room and run the same command again to go on"
            ) from error
        self._size += len(line)
        self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        self.ids.add(record["id"])
        if record["kind"] == QUESTION:
            self._questions[record["id"].partition("-")[0]].append(record["prompt"])

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                record = _parse(line)
                if record is not None:
                    self._add(record)
                    self._size += len(line)
                    if not line.endswith(b"\n"):  # an editor, or the kill, took the last line's end away
                        self._size += os.write(self._descriptor, b"\n")
                        break  # or what was just written would be read as a line
                elif not line.endswith(b"\n") and (line.startswith(_START) or _START.startswith(line)):
                    self.cut = len(line)
                    os.ftruncate(self._descriptor, self._size)
                else:
                    raise InvalidInputError(
                        f"{self.path}:{number} is not a record of make-pwc: {shorten(line.decode(errors='replace'))}; "
                        "correct or remove the line, or give another output"
                    )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and all(isinstance(record.get(field), str) for field in _FIELDS)
    return record if whole else None
