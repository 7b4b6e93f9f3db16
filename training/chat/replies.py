"""Reads replies of chat models, and shows them in messages."""

from __future__ import annotations

import re

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def reply_text(reply: str) -> str:
    """The reply without what a reasoning model thought first, stripped.

    Raises:
        ValueError: nothing is left.
    """
    text = encodable(_THOUGHTS.sub("", reply)).strip()
    if not text:
        raise ValueError("the reply is empty")
    return text


def encodable(text: str) -> str:
    """The text without lone surrogates, which JSON can escape and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def shorten(text: str, length: int = 80) -> str:
    """The text's beginning, on one line, quoted."""
    line = " ".join(text[: 4 * length].split())
    return repr(line if len(line) <= length else line[: length - 3] + "...")
