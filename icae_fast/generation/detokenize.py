"""Incremental detokenization: text from ids that arrive one by one, in whole characters, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icae_fast.core.tokens import added_tokens

_INCOMPLETE = "\ufffd"  # the replacement character, which tokenizers write for invalid or incomplete UTF-8


def hidden_tokens(tokenizer: Any) -> set[str]:
    """Return the tokens that decoding with `skip_special_tokens` omits.

    Args:
        tokenizer: a transformers tokenizer.
    """
    added = {t.content for t in added_tokens(tokenizer).values() if t.special}
    return added | set(tokenizer.all_special_tokens)


class IncrementalText:
    """Streaming decoder of one row of ids: returns the text piece by piece.

    A token may hold only part of a character (byte-level BPE, byte fallback), and its text may depend on the token
    before it (a leading space). Each piece is therefore decoded together with a few preceding tokens, whose text is
    then removed. Bytes are held back until their character is complete.

    Joined, the pieces equal `tokenizer.decode(ids, skip_special_tokens=True)`, with one exception: if an invalid byte
    directly follows valid characters, a byte-fallback decoder withdraws these characters. Here they stay, because they
    may already have been shown.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # context tokens, whose text has been returned, followed by new tokens
        self._n_out = 0  # number of context tokens
        self._returned = ""  # the part of the window's text that has been returned

    def push(self, token: int) -> str:
        """Add a token and return the text that is now final, possibly empty."""
        self._window.append(token)
        text = self._decode(self._window)
        if not text.startswith(self._returned):  # byte fallback has withdrawn returned characters; see above
            self._window, self._n_out, self._returned = self._window[self._n_out :], 0, ""
            text = self._decode(self._window)
        certain = text.rstrip(_INCOMPLETE)
        piece = certain[len(self._returned) :]
        if piece and certain == text:
            # Advance the window, so that it stays short. It must keep tokens with text: behind a special token alone
            # the next token would be decoded as the first of the text and lose its leading space.
            self._window = self._window[self._n_out :]
            self._n_out, self._returned = len(self._window), self._decode(self._window)
        else:
            self._returned += piece
        return piece

    def finish(self) -> str:
        """Return the text of the bytes held back, which never completed a character."""
        return self._decode(self._window)[len(self._returned) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StoppableText:
    """`IncrementalText` that ends before the first stop string.

    Text that may be the beginning of a stop string is held back, so no part of a stop string is ever returned. If one
    token completes several stop strings, the text is cut at the one that begins first. Bytes before it that complete no
    character go with it, so a text that is cut ends with a whole character.

    Args:
        tokenizer: a transformers tokenizer.
        stop_strings: strings that end the row; they are not part of its text.

    Attributes:
        text: all text returned so far.
        stopped: whether a stop string has been found.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self._incremental = IncrementalText(tokenizer)
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is now final, possibly empty."""
        self._held += self._incremental.push(token)
        places = [place for s in self._stop_strings if (place := self._held.find(s)) >= 0]
        if places:
            self.stopped = True
            piece, self._held = self._release(self._whole(min(places))), ""
            return piece
        held = self._possible_stop()
        return self._release(self._whole(len(self._held) - held) if held else len(self._held))

    def finish(self) -> str:
        """Return the text held back, at the end of a row without a stop string."""
        if self.stopped:
            return ""
        self._held += self._incremental.finish()
        return self._release(len(self._held))

    def _whole(self, n: int) -> int:
        """Return how many of the first n held characters stand before incomplete ones at their end."""
        return len(self._held[:n].rstrip(_INCOMPLETE))

    def _possible_stop(self) -> int:
        """Return how many characters at the end of the held text may begin a stop string."""
        ends = (n for s in self._stop_strings for n in range(1, len(s)) if self._held.endswith(s[:n]))
        return max(ends, default=0)

    def _release(self, n: int) -> str:
        piece, self._held = self._held[:n], self._held[n:]
        self.text += piece
        return piece
