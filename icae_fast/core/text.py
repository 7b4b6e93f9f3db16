"""The rule for text: how bytes and strings become the text that is tokenised, the same wherever it enters.

A text is Unicode without NUL. A byte order mark at its beginning is no part of it, and CRLF and CR are LF. So the same
text gives the same ids, and the same key in a store, from a file, a pipe, JSON lines or the API.

Importing this module does not import torch, so that readers of files stay light.
"""

from __future__ import annotations

import codecs
import re

from icae_fast.errors import InvalidInputError

BOM = "\ufeff"

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
          codecs.BOM_UTF16_BE: "UTF-16"}  # fmt: skip


def clean_text(text: str, what: str) -> str:
    """Return a text without byte order marks at its beginning and with LF at the end of lines.

    Args:
        text: any string; cleaning twice changes nothing more.
        what: name of the text in error messages: a file, "context 3", "the prompt".

    Raises:
        InvalidInputError: see `why_no_text`.
    """
    if problem := why_no_text(text):
        raise InvalidInputError(f"{what} {problem}")
    return unified(text)


def unified(text: str) -> str:
    """Return what `clean_text` does, without a check."""
    return text.lstrip(BOM).replace("\r\n", "\n").replace("\r", "\n")


def why_no_text(text: str) -> str | None:
    """Return why a string is no text, as the rest of a sentence that begins with its name; None for a text.

    NUL ends a string in many programs. Half a surrogate pair has no UTF-8 form; Python makes one of a byte of a file
    name or an argument that is not UTF-8, and JSON can escape one.
    """
    found = _NO_TEXT.search(text)
    if found is None:
        return None
    line, start = text.count("\n", 0, found.start()) + 1, text.rfind("\n", 0, found.start())
    place = f"line {line}, character {found.start() - start}"
    code = ord(found.group())
    if code == 0:
        return f"holds a NUL character (at {place}), which is no text; remove it"
    if 0xDC80 <= code <= 0xDCFF:
        return f"is not UTF-8 (the byte 0x{code - 0xDC00:02x} at {place}); convert it to UTF-8"
    return f"is not Unicode (half a surrogate pair, U+{code:04X}, at {place}); remove it"


def decode_text(data: bytes, what: str) -> str:
    """Return the text of a file's bytes; see `clean_text`.

    Args:
        data: UTF-8, with or without a byte order mark.
        what: name of the file in error messages.

    Raises:
        InvalidInputError: the bytes are not UTF-8, or hold a NUL.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
        line, start = data.count(b"\n", 0, error.start) + 1, data.rfind(b"\n", 0, error.start)
        place = f"the byte 0x{data[error.start]:02x} at line {line}, byte {error.start - start}"
        looks = f"; it looks like {encoding}" if encoding else ""
        raise InvalidInputError(f"cannot read {what} as UTF-8 text ({place}{looks}); convert it to UTF-8") from error
    return clean_text(text, what)
