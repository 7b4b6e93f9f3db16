"""Instruction data to be answered: rows of PwC's shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from icae_fast.errors import DataError
from training.records import PWC, find_files, read_records


@dataclass(frozen=True)
class Question:
    """A prompt about a text.

    Args:
        input: the text.
        prompt: what is asked about it.
        answer: the reference.
        kind: of the prompt, such as "summary"; empty where the data does not tell.
        origin: where it stands: "pwc.jsonl:17".
    """

    input: str
    prompt: str
    answer: str
    kind: str = ""
    origin: str = ""


def read_questions(paths: Sequence[str], limit: int | None = None) -> tuple[list[Question], Counter[str]]:
    """The rows of files, folders and globs of JSONL and Parquet with "input", "prompt", "answer", and maybe "kind".

    Args:
        paths: see `training.records.find_files`.
        limit: evenly spaced rows to take; None for all.

    Returns:
        The rows in order, and how many rows cannot be used, by cause.

    Raises:
        DataError: nothing is found, a file cannot be read, or no row can be used.
    """
    found: list[Question] = []
    problems: Counter[str] = Counter()
    for path in paths:
        files = find_files(path)
        if files is None:
            raise DataError(f"there is no file or folder {path}; evaluation reads files, no data sets of the hub")
        for record in read_records(files, PWC, optional=("kind",)):
            if record["problem"]:
                problems[record["problem"]] += 1
            else:
                found.append(Question(**{n: record[n] for n in (*PWC, "kind", "origin")}))
    if not found:
        causes = ", ".join(f"{n} times {cause}" for cause, n in problems.most_common()) or "no row at all"
        raise DataError(f"{', '.join(paths)} give no instruction data that can be used: {causes}")
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found, problems
