"""Tokenising: text is text, and only templates hold control tokens.

A control token (`<|im_end|>`, `<s>`, `[INST]` of some tokenizers) ends a turn or begins one. Transformers' tokenizers
make one of every place where a text spells it, so a document would end its own restoration and a question could forge a
system turn. `encode_text` spells it out instead, as any other characters. `encode_template` reads control tokens.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from icae_fast.errors import InvalidInputError, TokenizerMismatchError

SpecialTokens = Literal["text", "control"]

# A noncharacter of Unicode, which no text has a reason to hold. `_checked` refuses the text that does.
_HIDDEN = "\ufdd0{}\ufdd0"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, with the tokenizer's special tokens where they were asked for.

    Args:
        ids: token ids.
        offsets: (first character, character after the last) of each id.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


def encode_text(
    tokenizer: Any, text: str, what: str, *, add_special_tokens: bool, special_tokens: SpecialTokens = "text"
) -> list[int]:
    """Return the token ids of a user's text.

    A text that spells no control token gets the ids that the tokenizer gives it.

    Args:
        tokenizer: a transformers tokenizer.
        text: a text that `clean_text` has seen.
        what: name of the text in error messages.
        add_special_tokens: let the tokenizer add its own (BOS) around the text.
        special_tokens: `"text"`: the spelling of a control token is text; `"control"`: it becomes the token.

    Raises:
        InvalidInputError: the tokenizer cannot spell a control token as text, or cannot read one in a text.
    """
    return encode_texts(
        tokenizer, [text], [what], add_special_tokens=add_special_tokens, special_tokens=special_tokens
    )[0]


def encode_texts(
    tokenizer: Any,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    add_special_tokens: bool,
    special_tokens: SpecialTokens = "text",
) -> list[list[int]]:
    """Return the token ids of each text; see `encode_text`. A fast tokenizer reads them in parallel."""
    if is_mistral_common(tokenizer):
        if special_tokens == "control":
            raise InvalidInputError(
                "this tokenizer is one of mistral-common, which reads no control tokens in a text; leave "
                "special_tokens at 'text', or give ids"
            )
        return [tokenizer(t, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] for t in texts]
    options = {"add_special_tokens": add_special_tokens, "split_special_tokens": False, "verbose": False}
    if special_tokens == "control":
        return [tokenizer(text, **options)["input_ids"] for text in texts]
    control = _control_of(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        return [_encode_slowly(tokenizer, control, t, n, options) for t, n in zip(texts, names, strict=True)]
    found = tokenizer(list(texts), return_attention_mask=False, return_special_tokens_mask=True, **options)
    rows = []
    for text, what, ids, mask in zip(texts, names, found["input_ids"], found["special_tokens_mask"], strict=True):
        if control.arise_in(ids, mask):
            ids = control.spelled(text, what, add_special_tokens).ids
        rows.append(ids)
    return rows


def encode_with_offsets(tokenizer: Any, text: str, what: str, special_tokens: SpecialTokens = "text") -> Encoded:
    """Return the ids of a text without added special tokens, and the characters of each; for fast tokenizers.

    Args:
        tokenizer: a fast tokenizer.
        text, what, special_tokens: see `encode_text`.

    Raises:
        InvalidInputError: the tokenizer cannot spell a control token as text.
        TokenizerMismatchError: the tokenizer is slow, or one of mistral-common, and knows no places.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerMismatchError(
            f"{type(tokenizer).__name__} does not know which characters a token stands for; use a fast tokenizer "
            "(a folder with tokenizer.json)"
        )
    found = tokenizer(
        text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids, control = found["input_ids"], _control_of(tokenizer)
    if special_tokens == "text" and control.arise_in(ids):
        return control.spelled(text, what, False)
    return Encoded(ids, found["offset_mapping"])


def encode_template(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a part of a template, whose control tokens are control tokens."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]


def spells_control_tokens(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer would make a control token of a place in a text."""
    if is_mistral_common(tokenizer):
        return False
    return _control_of(tokenizer).arise_in(encode_template(tokenizer, text))


def is_mistral_common(tokenizer: Any) -> bool:
    """Return whether a tokenizer is one of the package mistral-common (`tekken.json`), behind transformers' class."""
    return getattr(tokenizer, "backend", None) == "mistral_common"


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that a text must not spell, id to content.

    These are the special tokens, and the added tokens that the chat template writes, which some models do not mark as
    special. Blanks and single characters are text in any case: some tokenizers name "!" as their padding.

    Args:
        tokenizer: a transformers tokenizer, also one of mistral-common.
    """
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    found.pop(None, None)  # a token that has no id
    template = getattr(tokenizer, "chat_template", None) or ""
    written = "".join(template.values()) if isinstance(template, Mapping) else template
    declared = getattr(tokenizer, "chat_control_tokens", None) or ()
    for i, token in added_tokens(tokenizer).items():
        if token.special or token.content in written or token.content in declared:
            found[i] = token.content
    return {i: content for i, content in found.items() if len(content.strip()) > 1}


def added_tokens(tokenizer: Any) -> dict[int, Any]:
    """Return a tokenizer's added tokens, id to `AddedToken`; none for mistral-common, which has only special ones."""
    found = tokenizer.added_tokens_decoder
    return dict(found) if isinstance(found, Mapping) else {}


def _encode_slowly(tokenizer: Any, control: _Control, text: str, what: str, options: Mapping[str, Any]) -> list[int]:
    """Tokenise with a tokenizer in Python, which does not mark the special tokens that it adds."""
    plain = tokenizer(text, **{**options, "add_special_tokens": False})["input_ids"]
    if not control.arise_in(plain):
        return tokenizer(text, **options)["input_ids"] if options["add_special_tokens"] else plain
    literal = {**options, "split_special_tokens": True}
    control.check(tokenizer(text, **{**literal, "add_special_tokens": False})["input_ids"], what)
    return tokenizer(text, **literal)["input_ids"]


class _Control:
    """The control tokens of a tokenizer in one state, and a twin of its backend that does not know their spelling."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokens = control_tokens(tokenizer)
        self._unknown = {getattr(tokenizer, "unk_token_id", None)}
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._twin: Tokenizer | None = None

    def arise_in(self, ids: Iterable[int], added: Iterable[int] = ()) -> bool:
        """Return whether ids hold a control token where `added`, the mask of added tokens, does not."""
        if self.tokens.keys().isdisjoint(ids):
            return False
        mask = list(added)
        return not mask or any(i in self.tokens and not m for i, m in zip(ids, mask, strict=True))

    def check(self, ids: Iterable[int], what: str) -> None:
        """Raise if ids of a text hold a control token, other than that of unknown characters."""
        left = next((i for i in ids if i in self.tokens and i not in self._unknown), None)
        if left is not None:
            raise InvalidInputError(
                f"{what} spells the control token {self.tokens[left]!r}, and the tokenizer cannot read that as text; "
                "spell it otherwise, or give token ids"
            )

    def spelled(self, text: str, what: str, add_special_tokens: bool) -> Encoded:
        """Tokenise a text in which control tokens are characters like others."""
        if self._twin is None:
            self._twin, unknown = _without_spelling(self._backend, self.tokens)
            self._unknown.add(unknown)
        found = self._twin.encode(text, add_special_tokens=add_special_tokens)
        self.check((i for i, m in zip(found.ids, found.special_tokens_mask, strict=True) if not m), what)
        return Encoded(found.ids, found.offsets)


# A tokenizer can get further tokens, so what is known of it belongs to a state.
_known: weakref.WeakKeyDictionary[Any, tuple[Any, _Control]] = weakref.WeakKeyDictionary()


def _control_of(tokenizer: Any) -> _Control:
    state = (len(tokenizer), str(tokenizer.special_tokens_map), str(getattr(tokenizer, "chat_template", None)))
    found = _known.get(tokenizer)
    if found is None or found[0] != state:
        found = state, _Control(tokenizer)
        _known[tokenizer] = found
    return found[1]


def _without_spelling(backend: Tokenizer, tokens: Mapping[int, str]) -> tuple[Tokenizer, int | None]:
    """Return a copy of a fast tokenizer with the same ids, in which no text spells some tokens, and its unknown id.

    The switch `encode_special_tokens` would not do: it is a state that threads share, it spares added tokens that are
    not marked as special, and models of words or of unigrams have control tokens among their words.
    """
    state = json.loads(backend.to_str())
    hidden = {content: _HIDDEN.format(i) for i, content in tokens.items()}
    for token in state["added_tokens"]:
        if token["id"] in tokens:  # renamed, not removed: ids are given in order
            token |= {"content": _HIDDEN.format(token["id"]), "normalized": False, "lstrip": False, "rstrip": False}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if hidden.keys().isdisjoint((*m, "".join(m)))]
    unknown = model.get("unk_id")
    if (name := model.get("unk_token")) is not None:
        model["unk_token"] = hidden.get(name, name)
        unknown = model["vocab"].get(model["unk_token"])
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state)), unknown
