"""Two texts side by side in Markdown, with the differences in bold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]<>|~#])")


def word_runs(original: Sequence[str], restored: Sequence[str]) -> Iterator[tuple[bool, Sequence[str], Sequence[str]]]:
    """Align two texts and yield runs of words: (whether they are equal, words of the original, words restored)."""
    matcher = difflib.SequenceMatcher(None, original, restored, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        yield tag == "equal", original[a:b], restored[c:d]


def mark_differences(original: str, restored: str, max_words: int | None = None) -> tuple[str, str]:
    """Return both texts as one line of Markdown each, with the words that differ in bold.

    Args:
        original, restored: texts; any whitespace becomes a single space.
        max_words: words after which a text is cut off with an ellipsis; None for no limit.
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
    """Return a Markdown table of (label, original, restored) with the differences in bold; see `mark_differences`."""
    lines = ["| | original | restored |", "| --- | --- | --- |"]
    for what, original, restored in examples:
        left, right = mark_differences(original, restored, max_words)
        lines.append(f"| {what} | {left} | {right} |")
    return "\n".join(lines)
