"""Draw reproducible passages of given lengths from texts."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from icae_fast.core.tokens import encode_with_offsets
from icae_fast.errors import DataError
from icae_fast.training.data.records import TEXT, TEXT_FIELD, usable_records
from icae_fast.training.pwc.passages import Document

_TRIES = 64  # places tried per passage before the texts are considered exhausted
_WORD_BEGIN = re.compile(r"(?<=\s)\S|\A\S")
_CHARACTERS = 8  # characters tokenised per needed token; doubled until they suffice


@dataclass(frozen=True)
class Excerpt:
    """Consecutive tokens of a text.

    Args:
        ids: ids of the passage.
        following: ids of the tokens after it.
        origin: where it begins, e.g. "books.jsonl:17, character 120".
    """

    ids: list[int]
    following: list[int]
    origin: str


class Texts:
    """The texts of files, folders and globs.

    Args:
        paths: `.txt`, `.jsonl`, `.json` and `.parquet`, as for training; see
            `icae_fast.training.data.records.find_files`. Empty for measurements that draw no passages.
        text_field: field or column of the text in a row.

    Attributes:
        documents: the documents in order.
        problems: number of rows without text, by cause.

    Raises:
        DataError: nothing is found, a file cannot be read, or no row holds text.
    """

    def __init__(self, paths: Sequence[str], text_field: str = TEXT_FIELD) -> None:
        self.documents: list[Document] = []
        self.problems: Counter[str] = Counter()
        if paths:
            records, self.problems = usable_records(paths, TEXT, "text", text_field=text_field)
            self.documents = [Document(r["text"], r["origin"]) for r in records]

    def draw(self, tokenizer: Any, n_tokens: int, count: int, seed: int, following: int = 0) -> list[Excerpt]:
        """Draw passages that do not overlap and begin with a word, at places uniform over the texts' characters.

        The places depend only on the seed as long as enough text follows them, so passages of different lengths, and in
        different models' tokens, begin at the same places.

        Args:
            tokenizer: the tokenizer; special tokens are not added.
            n_tokens: length of a passage.
            count: number of passages.
            seed: seed of the places.
            following: number of tokens needed after each passage.

        Returns:
            `count` passages, or fewer if the texts hold no more.

        Raises:
            DataError: no text is long enough for a passage.
        """
        needed = n_tokens + following
        usable = [d for d in self.documents if len(d.text) >= needed]  # a token has at least one character
        rng = random.Random(seed)
        taken: dict[int, list[tuple[int, int]]] = {}
        found: list[Excerpt] = []
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
                "texts, e.g. a whole book in one file"
            )
        return found


def _window(tokenizer: Any, document: Document, offset: int, needed: int) -> tuple[int, int, list[int]] | None:
    """Return (first character, end character, ids) of `needed` tokens from the next word on, None at the text's end."""
    word = _WORD_BEGIN.search(document.text, offset)
    if word is None:
        return None
    start, size = word.start(), _CHARACTERS * needed
    while True:
        text = document.text[start : start + size]
        found = encode_with_offsets(tokenizer, text, document.origin)
        ids = found.ids
        # The cut may split the last word into tokens that the text does not have.
        if len(ids) > needed + 1 or (start + size >= len(document.text) and len(ids) >= needed):
            return start, start + found.offsets[needed - 1][1], ids[:needed]
        if start + size >= len(document.text):
            return None
        size *= 2
