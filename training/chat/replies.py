"""Read replies of chat models, and quote them in messages."""

from __future__ import annotations

import re

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def reply_text(reply: str) -> str:
    """Return the reply without a leading `<think>` block, stripped.

    Raises:
        ValueError: nothing is left.
    """
    text = encodable(_THOUGHTS.sub("", reply)).strip()
    if not text:
        raise ValueError("the reply is empty")
    return text


def encodable(text: str) -> str:
    """Replace lone surrogates, which JSON can escape but UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def shorten(text: str, length: int = 80) -> str:
    """Return the start of a text, quoted and on one line."""
    line = " ".join(text[: 4 * length].split())
    return repr(line if len(line) <= length else line[: length - 3] + "...")
