"""Read texts and cut them into passages."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from icae_fast.errors import DataError
from icae_fast.training.data.records import TEXT, TEXT_FIELD, find_files, read_records

# Where a text may be cut, best first. The last group of a match is the gap, which belongs to the part after it.
_BREAKS = (
    re.compile(r"(\n[^\S\n]*\n\s*)"),  # paragraphs
    re.compile(r"(\n)"),
    re.compile(r"[.!?…][\"'”’)\]]*(\s+)|[。！？]()"),  # sentences
    re.compile(r"(\s+)"),
)
# Chinese and Japanese have no spaces between words, so every character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Document:
    """A text and its origin: a file, or a row of one (`file:line`)."""

    text: str
    origin: str


@dataclass(frozen=True)
class Passage:
    """A part of a document.

    Args:
        text: the passage, stripped.
        following: the next passage of the document, empty at its end.
        origin: the document's origin, with `#n` for its n-th passage if there are several.
        size: number of words or tokens.
    """

    text: str
    following: str
    origin: str
    size: int

    @property
    def key(self) -> str:
        """The first 16 hexadecimal digits of the text's SHA-256."""
        return sha256(self.text.encode()).hexdigest()[:16]


def read_documents(
    paths: Sequence[str | Path],
    on_bad_row: Callable[[str], None],
    exclude: Path | None = None,
    text_field: str = TEXT_FIELD,
) -> Iterator[Document]:
    """Yield the documents of files and folders in order, in the formats of `icae_fast.training.data.records`.

    Args:
        paths: files, folders, globs or URLs, as for `find_files`.
        on_bad_row: called with a sentence for each file or row without text, which is left out.
        exclude: a file to skip, e.g. the output if it lies in one of the folders.
        text_field: field or column of the text in a row.

    Raises:
        DataError: a path does not exist, has an unknown extension, or cannot be read to its end.
    """
    for path in map(str, paths):
        found = find_files(path)
        if found is None:
            raise DataError(f"there is no file or folder {path}; check the path")
        wanted = [name for name in found if exclude is None or Path(name).resolve() != exclude.resolve()]
        for record in read_records(wanted, TEXT, text_field=text_field):
            if record["problem"]:
                on_bad_row(f"{record['origin']}: {record['problem']}")
            else:
                yield Document(record["text"], record["origin"])


def count_words(text: str) -> int:
    """Count words between spaces; every Chinese character and every kana counts as one."""
    return sum(1 for _ in _WORD.finditer(text))


def split(document: Document, limit: int, count: Callable[[str], int]) -> list[Passage]:
    """Cut a document greedily into passages of at most `limit` words or tokens.

    A passage ends with a paragraph. If a paragraph is too long, it ends with a line, a sentence, a word, or a
    character.

    Args:
        document: the document to cut.
        limit: maximum of `count` for a passage.
        count: returns the words or tokens of a text. Parts are counted separately and added up. That is exact for
            words, and never too low for tokens as long as no token starts before a space and ends after it.
    """
    texts = [text.strip() for text in _cut(document.text, limit, count)]
    texts = [text for text in texts if text]
    origins = [f"{document.origin}#{n}" if len(texts) > 1 else document.origin for n in range(1, len(texts) + 1)]
    return [
        Passage(text, following, origin, count(text))
        for (text, following), origin in zip(itertools.pairwise([*texts, ""]), origins, strict=True)
    ]


def _cut(text: str, limit: int, count: Callable[[str], int], level: int = 0) -> list[str]:
    if count(text) <= limit or len(text) == 1:
        return [text]
    if level == len(_BREAKS):
        middle = len(text) // 2
        return [part for half in (text[:middle], text[middle:]) for part in _cut(half, limit, count, level)]
    cuts, passage, size = [], "", 0
    for part in _parts(text, _BREAKS[level]):
        added = count(part)
        if size + added > limit:
            cuts.append(passage)
            passage, size = "", 0
            if added > limit:
                *full, part = _cut(part, limit, count, level + 1)
                cuts += full
                added = count(part)
        passage += part
        size += added
    return [*cuts, passage]


def _parts(text: str, breaks: re.Pattern[str]) -> Iterator[str]:
    start = 0
    for match in breaks.finditer(text):
        end = match.start(match.lastindex or 0)
        yield text[start:end]
        start = end
    yield text[start:]
