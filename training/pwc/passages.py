"""Texts, and the passages that they are cut into."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from icae_fast.errors import InvalidInputError

LINES_SUFFIXES = (".jsonl", ".ndjson")
_FOLDER_SUFFIXES = (".txt", *LINES_SUFFIXES)

# Where a text may be cut, best first: the last group of a match is the gap, which goes to what follows it.
_BREAKS = (
    re.compile(r"(\n[^\S\n]*\n\s*)"),  # paragraphs
    re.compile(r"(\n)"),
    re.compile(r"[.!?…][\"'”’)\]]*(\s+)|[。！？]()"),  # sentences
    re.compile(r"(\s+)"),
)
# Chinese and Japanese put no blanks between words, so each of their characters counts.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Document:
    """A text and where it was read: a file, or `file:line`."""

    text: str
    origin: str


@dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
        text: without blanks at its ends.
        following: the passage behind it in the document, empty at the document's end.
        origin: the document's origin, and `#n` for its n-th passage where there are several.
        size: words or tokens, as counted when it was cut.
    """

    text: str
    following: str
    origin: str
    size: int

    @property
    def key(self) -> str:
        """The same for the same text, wherever it was read: 16 hexadecimal digits of its SHA-256."""
        return sha256(self.text.encode()).hexdigest()[:16]


def read_documents(
    paths: Sequence[str | Path], on_bad_row: Callable[[str], None], exclude: Path | None = None
) -> Iterator[Document]:
    """Documents of files and folders, in order.

    `.jsonl` and `.ndjson` hold a JSON object with a "text" a line; any other file is one text in UTF-8. Of a folder,
    the `.txt`, `.jsonl` and `.ndjson` files at any depth are read, in the order of their paths.

    Args:
        paths: files and folders.
        on_bad_row: told, in a sentence, about each file or line that holds no text; it is left out.
        exclude: a file that is not read, for an output that lies in one of the folders.

    Raises:
        InvalidInputError: a path does not exist, or cannot be read.
    """
    for path in _files(paths):
        if exclude is not None and path.resolve() == exclude.resolve():
            continue
        try:
            if path.suffix.lower() in LINES_SUFFIXES:
                yield from _read_lines(path, on_bad_row)
            else:
                text = path.read_text(encoding="utf-8")
                if text.strip():
                    yield Document(text, str(path))
                else:
                    on_bad_row(f"{path}: the file is empty")
        except UnicodeDecodeError as error:
            on_bad_row(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})")
        except OSError as error:
            raise InvalidInputError(f"cannot read {path} ({error.strerror}); check the path") from error


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _FOLDER_SUFFIXES and p.is_file())
            if not files:
                raise InvalidInputError(f"the folder {path} holds no {' or '.join(_FOLDER_SUFFIXES)} file")
            yield from files
        elif path.exists():
            yield path
        else:
            raise InvalidInputError(f"there is no file or folder {path}; check the path")


def _read_lines(path: Path, on_bad_row: Callable[[str], None]) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                on_bad_row(f"{origin}: not JSON ({error})")
                continue
            text = row.get("text") if isinstance(row, dict) else None
            if isinstance(text, str) and text.strip():
                # A lone surrogate, which JSON can escape and UTF-8 cannot hold, would fail when it is written.
                yield Document(text.encode("utf-8", "replace").decode(), origin)
            else:
                on_bad_row(f'{origin}: no "text" that is a string and not empty')


def count_words(text: str) -> int:
    """Words between blanks; each Chinese character and each kana counts as one."""
    return sum(1 for _ in _WORD.finditer(text))


def split(document: Document, limit: int, count: Callable[[str], int]) -> list[Passage]:
    """Passages of at most `limit`, filled up in order.

    A passage ends with a paragraph, or where one is too long with a line, a sentence, a word, or a character.

    Args:
        document: what to cut.
        limit: the most that `count` may give for a passage.
        count: words or tokens of a text. Parts are counted apart and added up, which is exact for words, and for
            tokens never too low as long as no token crosses a blank from its left.
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
        end = match.start(match.lastindex)
        yield text[start:end]
        start = end
    yield text[start:]
