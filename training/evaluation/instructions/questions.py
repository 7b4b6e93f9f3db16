"""Instruction data to be answered: rows of PwC's shape."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from icae_fast.training.data.records import PWC, usable_records


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


def read_questions(
    paths: Sequence[str], limit: int | None = None, seed: int = 0
) -> tuple[list[Question], Counter[str]]:
    """The rows of files, folders and globs of JSONL and Parquet with "input", "prompt", "answer", and maybe "kind".

    Args:
        paths: see `icae_fast.training.data.records.find_files`.
        limit: rows to take, drawn at random; None for all.
        seed: of the drawing.

    Returns:
        The rows in order, and how many rows cannot be used, by cause.

    Raises:
        DataError: nothing is found, a file cannot be read, or no row can be used.
    """
    records, problems = usable_records(paths, PWC, "instruction data", optional=("kind",))
    if limit is not None and limit < len(records):
        # Not evenly spaced: rows of one passage after another have their kinds at even distances.
        records = [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), limit))]
    return [Question(**{name: record[name] for name in (*PWC, "kind", "origin")}) for record in records], problems
