"""The output: a JSONL file of complete records that can be resumed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from icae_fast.errors import InvalidInputError
from icae_fast.training.chat.replies import shorten
from icae_fast.training.data.line_file import LineFile
from icae_fast.training.pwc.prompts import QUESTION

_FIELDS = ("id", "input", "prompt", "answer", "kind", "origin", "teacher")
_START = b'{"id": "'  # the start of every record, to tell a truncated record from a foreign line


class RecordFile:
    """Records appended to a JSONL file; use it in a `with`.

    A truncated last record of a killed run is removed. Only one process can write at a time; see `LineFile`.

    Args:
        path: the file.

    Attributes:
        ids: ids of the file's records.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ids: set[str] = set()
        self._questions: dict[str, list[str]] = defaultdict(list)
        self._file = LineFile(path)

    def __enter__(self) -> RecordFile:
        """Open the file and read its records.

        Raises:
            OutputError: the file cannot be opened for writing, or another process is writing it.
            InvalidInputError: a line is not a record of this command.
        """
        self._file.resume(self._accept)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    @property
    def cut(self) -> int:
        """Bytes of a truncated record that were removed on opening."""
        return self._file.cut

    def questions(self, passage_key: str) -> list[str]:
        """Return the questions about a passage that have records."""
        return self._questions.get(passage_key, [])

    def append(self, record: dict[str, Any]) -> None:
        """Write one record.

        Args:
            record: id, input, prompt, answer, kind, origin and teacher, all strings.

        Raises:
            OutputError: the record cannot be written, e.g. because the disk is full; the file keeps the earlier ones.
        """
        record = {field: record[field] for field in _FIELDS}
        self._file.append(json.dumps(record, ensure_ascii=False))
        self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        self.ids.add(record["id"])
        if record["kind"] == QUESTION:
            self._questions[record["id"].partition("-")[0]].append(record["prompt"])

    def _accept(self, number: int, line: bytes) -> bool:
        record = _parse(line)
        if record is not None:
            self._add(record)
        elif line.endswith(b"\n") or not (line.startswith(_START) or _START.startswith(line)):
            raise InvalidInputError(
                f"{self.path}:{number} is not a record of make-pwc: {shorten(line.decode(errors='replace'))}; "
                "correct or remove the line, or give another output"
            )
        return record is not None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and all(isinstance(record.get(field), str) for field in _FIELDS)
    return record if whole else None
