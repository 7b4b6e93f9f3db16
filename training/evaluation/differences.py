"""Two texts side by side in Markdown, with what differs in bold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]<>|~#])")


def word_runs(original: Sequence[str], restored: Sequence[str]) -> Iterator[tuple[bool, Sequence[str], Sequence[str]]]:
    """Runs of words that two texts share or not: (whether they are equal, those of the one, those of the other)."""
    matcher = difflib.SequenceMatcher(None, original, restored, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        yield tag == "equal", original[a:b], restored[c:d]


def mark_differences(original: str, restored: str, max_words: int | None = None) -> tuple[str, str]:
    """Both texts as Markdown on one line each, in bold the words of either that the other has not at that place.

    Args:
        original, restored: any texts; blanks become single ones.
        max_words: where a text is cut off, with an ellipsis; None for nowhere.
    """
    words = [text.split()[:max_words] for text in (original, restored)]
    marked: tuple[list[str], list[str]] = ([], [])
    for equal, *runs in word_runs(*words):
        for side, chosen in zip(marked, runs, strict=True):
            text = " ".join(_MARKUP.sub(r"\\\1", word) for word in chosen)
            if text:
                side.append(text if equal else f"**{text}**")
    for side, own, text in zip(marked, words, (original, restored), strict=True):
        if len(own) < len(text.split()):
            side.append("...")
    return " ".join(marked[0]), " ".join(marked[1])


def side_by_side(examples: Sequence[tuple[str, str, str]], max_words: int | None = None) -> str:
    """A Markdown table of (what it is, original, restored), with the differences marked; see `mark_differences`."""
    lines = ["| | original | restored |", "| --- | --- | --- |"]
    for what, original, restored in examples:
        left, right = mark_differences(original, restored, max_words)
        lines.append(f"| {what} | {left} | {right} |")
    return "\n".join(lines)
