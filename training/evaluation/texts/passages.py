"""Draws passages of given lengths from texts, the same in every run."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from icae_fast.errors import DataError
from icae_fast.training.data.records import TEXT, usable_records
from icae_fast.training.pwc.passages import Document

_TRIES = 64  # places that are looked at for a passage before texts are taken to hold no more
_WORD_BEGIN = re.compile(r"(?<=\s)\S|\A\S")
_CHARACTERS = 8  # tokenised for a token that is needed; more are, where that was too little


@dataclass(frozen=True)
class Excerpt:
    """Consecutive tokens of a text.

    Args:
        ids: the passage.
        following: tokens behind it.
        origin: where it begins: "books.jsonl:17, character 120".
    """

    ids: list[int]
    following: list[int]
    origin: str


class Texts:
    """The texts of files, folders and globs.

    Args:
        paths: as for training, `.txt`, `.jsonl`, `.ndjson` and `.parquet`; see
        `icae_fast.training.data.records.find_files`. None at
            all are no texts, for measurements that draw nothing.

    Attributes:
        documents: in order.
        problems: rows that hold no text, by cause.

    Raises:
        DataError: nothing is found, a file cannot be read, or no row holds text.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.documents: list[Document] = []
        self.problems: Counter[str] = Counter()
        if paths:
            records, self.problems = usable_records(paths, TEXT, "text")
            self.documents = [Document(r["text"], r["origin"]) for r in records]

    def draw(self, tokenizer: Any, n_tokens: int, count: int, seed: int, following: int = 0) -> list[Excerpt]:
        """Passages that begin with a word at random places of the texts, every character alike, and do not overlap.

        The places depend on the seed alone as long as the texts go on for long enough behind them, so that passages of
        several lengths, and in several models' tokens, begin alike.

        Args:
            tokenizer: special tokens are not added.
            n_tokens: length of each.
            count: how many.
            seed: of the places.
            following: tokens that are needed behind each.

        Returns:
            `count` of them, or fewer where the texts hold no more.

        Raises:
            DataError: no text is long enough for a single one.
        """
        needed = n_tokens + following
        usable = [d for d in self.documents if len(d.text) >= needed]  # a token has a character at least
        rng, taken, found = random.Random(seed), {}, []
        ends = list(accumulate(len(d.text) for d in usable))
        for _ in range(_TRIES * count if usable else 0):
            if len(found) == count:
                break
            place = rng.randrange(ends[-1])
            i = bisect_right(ends, place)
            window = _window(tokenizer, usable[i], place - (ends[i] - len(usable[i].text)), needed)
            if window is None:
                continue
            start, end, ids = window
            own = taken.setdefault(i, [])
            if all(end <= a or b <= start for a, b in own):
                own.append((start, end))
                origin = f"{usable[i].origin}, character {start}"
                found.append(Excerpt(ids[:n_tokens], ids[n_tokens:], origin))
        if not found:
            longest = max((len(d.text) for d in self.documents), default=0)
            raise DataError(
                f"none of the texts has {needed} tokens in a row (the longest has {longest:,} characters); give longer "
                "texts, such as a whole book in one file"
            )
        return found


def _window(tokenizer, document, offset, needed):
    """(first character, character behind, ids) of so many tokens from the next word on, None where the text ends."""
    word = _WORD_BEGIN.search(document.text, offset)
    if word is None:
        return None
    start, size = word.start(), _CHARACTERS * needed
    while True:
        text = document.text[start : start + size]
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = found["input_ids"]
        # What the cut has made of the last word is no token of the text.
        if len(ids) > needed + 1 or (start + size >= len(document.text) and len(ids) >= needed):
            return start, start + found["offset_mapping"][needed - 1][1], ids[:needed]
        if start + size >= len(document.text):
            return None
        size *= 2
