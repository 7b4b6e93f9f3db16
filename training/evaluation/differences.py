"""Two texts side by side in Markdown, with what differs in bold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]<>|~#])")


def mark_differences(original: str, restored: str, max_words: int | None = None) -> tuple[str, str]:
    """Both texts as Markdown on one line each, in bold the words of either that the other has not at that place.

    Args:
        original, restored: any texts; blanks become single ones.
        max_words: where a text is cut off, with an ellipsis; None for nowhere.
    """
    words = [text.split()[:max_words] for text in (original, restored)]
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    marked: tuple[list[str], list[str]] = ([], [])
    for tag, a, b, c, d in matcher.get_opcodes():
        for side, chosen in zip(marked, (words[0][a:b], words[1][c:d]), strict=True):
            text = " ".join(_MARKUP.sub(r"\\\1", word) for word in chosen)
            if text:
                side.append(text if tag == "equal" else f"**{text}**")
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
