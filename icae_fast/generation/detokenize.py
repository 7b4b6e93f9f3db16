"""From token ids to text while they come: no half characters, and cut at a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what tokenizers write for bytes that are no character, or none yet


def hidden_tokens(tokenizer: Any) -> set[str]:
    """The tokens that `skip_special_tokens` leaves out of text."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return added | set(tokenizer.all_special_tokens)


class IncrementalText:
    """The text of a growing row of ids, given out piece by piece.

    A token may hold a part of a character only (byte-level BPE, byte fallback), and what it is written as may depend
    on the token before it (a blank at the beginning). So each piece is what a few tokens say together, without those
    before, and the bytes of a character are held back until the last of them is there. All pieces together are
    `tokenizer.decode(ids, skip_special_tokens=True)`. There is one exception: a byte-fallback decoder withdraws valid
    characters that an invalid byte follows at once, and here they stay, since they may have been shown already.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens whose text is out, for context, and after them those that are new
        self._n_out = 0  # tokens of the window whose text is out
        self._given = ""  # the part of the window's text that is out

    def push(self, token: int) -> str:
        """Add a token; gives the text that is now certain, perhaps none."""
        self._window.append(token)
        text = self._decode(self._window)
        if not text.startswith(self._given):  # byte fallback took back what is out; see above
            self._window, self._n_out, self._given = self._window[self._n_out :], 0, ""
            text = self._decode(self._window)
        certain = text.rstrip(_INCOMPLETE)
        piece = certain[len(self._given) :]
        if piece and certain == text:
            # The window moves on and so stays short; it keeps tokens that have text, as a special token alone would
            # make the next one the beginning, which loses its blank.
            self._window = self._window[self._n_out :]
            self._n_out, self._given = len(self._window), self._decode(self._window)
        else:
            self._given += piece
        return piece

    def finish(self) -> str:
        """The text of bytes that were held back and never became a character."""
        return self._decode(self._window)[len(self._given) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StoppableText:
    """`IncrementalText` that ends where a stop string begins.

    What may be the beginning of a stop string is held back, so that no part of one is ever given out. Of several
    that one token completes, the one that begins first counts.

    Args:
        tokenizer: a transformers tokenizer.
        stop_strings: texts that end the row; they are not part of it.

    Attributes:
        text: all text given out so far.
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self._incremental = IncrementalText(tokenizer)
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; gives the text that is now certain, perhaps none."""
        self._held += self._incremental.push(token)
        places = [place for s in self._stop_strings if (place := self._held.find(s)) >= 0]
        if places:
            self.stopped = True
            piece, self._held = self._give(min(places)), ""
            return piece
        return self._give(len(self._held) - self._begun())

    def finish(self) -> str:
        """What was held back, where the row ends without a stop string."""
        if self.stopped:
            return ""
        self._held += self._incremental.finish()
        return self._give(len(self._held))

    def _begun(self) -> int:
        """Characters at the end of what is held that may begin a stop string."""
        ends = (n for s in self._stop_strings for n in range(1, len(s)) if self._held.endswith(s[:n]))
        return max(ends, default=0)

    def _give(self, n: int) -> str:
        piece, self._held = self._held[:n], self._held[n:]
        self.text += piece
        return piece
