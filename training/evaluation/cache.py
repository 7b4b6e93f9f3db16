"""A cache of everything an evaluation has computed, so that an interrupted run can resume."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from icae_fast.errors import InvalidInputError
from icae_fast.training.data.line_file import LineFile

_START = b'{"key": "'  # the start of every line


class AnswerCache:
    """JSON values by key in an append-only JSONL file; use it in a `with`.

    Every line has a checksum. A truncated last line of a killed run is removed. A damaged line is counted and stays in
    the file; its value is missing and will be computed again. Only one process can use a file at a time.

    Args:
        path: the file, in an existing folder.

    Attributes:
        damaged: damaged lines found on opening.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damaged = 0
        self._values: dict[str, Any] = {}
        self._file = LineFile(path)

    def __enter__(self) -> AnswerCache:
        """Open the file and read it.

        Raises:
            OutputError: the file cannot be opened for writing, or another process is writing it.
            InvalidInputError: it is not a file of this class.
        """
        self._file.resume(self._accept)
        if self.damaged and not self._values:
            self.__exit__()
            raise self._foreign()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any | None:
        """Return the last value put under a key, None if there is none."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Append a JSON value to the file.

        Raises:
            OutputError: the value cannot be written; earlier values are kept.
        """
        self._file.append(json.dumps({"key": key, "value": value, "crc": _checksum(key, value)}, ensure_ascii=False))
        self._values[key] = value

    def _accept(self, number: int, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            whole = isinstance(key, str) and entry["crc"] == _checksum(key, value)
        except (ValueError, LookupError, TypeError, RecursionError):
            whole = False
        if whole:
            self._values[key] = value
        elif line.endswith(b"\n"):
            self.damaged += 1
        elif not (self._values or line.startswith(_START) or _START.startswith(line)):
            raise self._foreign()
        return whole

    def _foreign(self) -> InvalidInputError:
        return InvalidInputError(f"{self.path} holds no answers of an evaluation; give another file, or remove it")


def _checksum(key: str, value: Any) -> int:
    return zlib.crc32(json.dumps([key, value]).encode())
