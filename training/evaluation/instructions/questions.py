"""Questions to answer: rows of instruction data in the format of PwC."""

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
        prompt: the prompt.
        answer: the reference answer.
        kind: kind of the prompt, e.g. "summary"; empty if the data has none.
        origin: file and line, e.g. "pwc.jsonl:17".
    """

    input: str
    prompt: str
    answer: str
    kind: str = ""
    origin: str = ""


def read_questions(
    paths: Sequence[str], limit: int | None = None, seed: int = 0
) -> tuple[list[Question], Counter[str]]:
    """Read rows with "input", "prompt", "answer" and optionally "kind" from JSONL and Parquet.

    Args:
        paths: files, folders and globs; see `icae_fast.training.data.records.find_files`.
        limit: number of rows to draw at random; None takes all.
        seed: seed of the draw.

    Returns:
        The rows in order, and the number of unusable rows by cause.

    Raises:
        DataError: nothing is found, a file cannot be read, or no row can be used.
    """
    records, problems = usable_records(paths, PWC, "instruction data", optional=("kind",))
    if limit is not None and limit < len(records):
        # Not evenly spaced, because the kinds of prompts repeat with a fixed period in the file.
        records = [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), limit))]
    return [Question(**{name: record[name] for name in (*PWC, "kind", "origin")}) for record in records], problems
