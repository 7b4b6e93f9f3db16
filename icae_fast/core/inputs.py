"""Convert user input (text or ids, one or many) into checked token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from icae_fast.checks import is_int
from icae_fast.config import ICAEConfig
from icae_fast.core.text import clean_text
from icae_fast.core.tokens import SpecialTokens, added_tokens, encode_text
from icae_fast.errors import InvalidInputError, TokenizerMismatchError

Context = str | Sequence[int] | torch.Tensor

# An embedding matrix may have a few more rows than the tokenizer has tokens (Qwen: 0.2 %, DeepSeek: 2.3 %).
MAX_UNUSED_VOCABULARY = 0.05


class Vocabulary:
    """Ids of the base model's tokens and of the tokens that ICAE adds after them.

    `size = base + 1` ([PAD] is id `size - 1`); memory tokens are `size .. size + k - 1`; then AE, LM, FT.

    Args:
        n_base: rows of the base model's token embedding.
        config: has k, the number of memory tokens.

    Source: getao/icae `code/icae_v2/modeling_icae_multi_span.py`, `ICAE.__init__`.
    """

    def __init__(self, n_base: int, config: ICAEConfig) -> None:
        self.n_base = n_base
        self.size = n_base + 1
        self.pad = n_base
        self.first_memory = self.size
        self.ae = self.size + config.memory_size
        self.lm = self.ae + 1
        self.ft = self.ae + 2

    def is_memory(self, ids: torch.Tensor) -> torch.Tensor:
        """Return True where an id is a memory token's."""
        return (ids >= self.first_memory) & (ids < self.ae)

    def check_context(self, ids: torch.Tensor, what: str) -> torch.Tensor:
        """Return the ids if there is at least one and all are base tokens.

        Raises:
            InvalidInputError: no id, or one that is no base token.
        """
        if ids.numel() == 0:
            raise InvalidInputError(f"{what} is empty; give at least one token")
        low, high = int(ids.min()), int(ids.max())
        if low < 0:
            raise InvalidInputError(f"{what} holds the negative id {low}; ids are 0 to {self.n_base - 1}")
        if high >= self.n_base:
            kind = {self.pad: "the [PAD] id"}.get(high)
            if kind is None:
                kind = "a memory or special token's id" if high <= self.ft else "out of range"
            raise InvalidInputError(
                f"{what} holds the id {high}, which is {kind}; ids are 0 to {self.n_base - 1}, and memory tokens "
                "are added by the package"
            )
        return ids


def check_tokenizer(tokenizer: Any, n_base: int) -> None:
    """Raise unless the tokenizer can belong to a model with `n_base` token embeddings.

    Special tokens that were added behind the embeddings, such as a padding token for training, are no obstacle: texts
    do not hold them, and a row of ids that does is refused.

    Raises:
        TokenizerMismatchError: it has more tokens, or over 5 % fewer.
    """
    n = len(tokenizer)
    if n > n_base:
        n -= sum(i >= n_base and token.special for i, token in added_tokens(tokenizer).items())
    if n > n_base or n < n_base * (1 - MAX_UNUSED_VOCABULARY):
        raise TokenizerMismatchError(
            f"the tokenizer has {n} tokens and the base model {n_base} embeddings; pass the base model's own tokenizer"
        )


def _is_ids(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 1
    return not isinstance(value, str) and len(value) > 0 and all(is_int(v) for v in value)


def as_list(contexts: Any) -> list[Any]:
    """Return one context or many as a list of contexts.

    Raises:
        InvalidInputError: no context, or a value of another type.
    """
    scalar = isinstance(contexts, torch.Tensor) and contexts.dim() == 0
    if scalar or isinstance(contexts, (bytes, Mapping)) or not hasattr(contexts, "__len__"):
        raise InvalidInputError(f"expected text or token ids, one or a list, and got {type(contexts).__name__}")
    if isinstance(contexts, str) or (len(contexts) and _is_ids(contexts)):
        return [contexts]
    if len(contexts) == 0:
        raise InvalidInputError("the list is empty; give at least one text or one row of token ids")
    return list(contexts)


def to_ids(
    value: Any, tokenizer: Any, what: str, *, add_special_tokens: bool, special_tokens: SpecialTokens = "text"
) -> torch.Tensor:
    """Return text or ids as a (L,) int64 tensor, untruncated.

    Args:
        value: a text, cleaned here by `icae_fast.core.text.clean_text`, or a row of ids, which stay as they are.
        tokenizer: of the base model; None will do for ids.
        what: name of the value in error messages.
        add_special_tokens, special_tokens: see `icae_fast.core.tokens.encode_text`.

    Raises:
        TokenizerMismatchError: text without a tokenizer.
        InvalidInputError: no text, or neither text nor whole numbers.
    """
    if isinstance(value, str):
        value = clean_text(value, what)
        if not value:  # a tokenizer that adds a BOS would make a token of it
            raise InvalidInputError(f"{what} is empty; give at least one token")
        if tokenizer is None:
            raise TokenizerMismatchError(f"{what} is text, but there is no tokenizer; pass token ids or tokenizer=")
        value = encode_text(
            tokenizer, value, what, add_special_tokens=add_special_tokens, special_tokens=special_tokens
        )
        return torch.tensor(value, dtype=torch.int64)
    if isinstance(value, torch.Tensor):
        if value.dim() != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise InvalidInputError(
                f"{what} is a {value.dtype} tensor of shape {tuple(value.shape)}; token ids are one row of integers"
            )
        return value.to(device="cpu", dtype=torch.int64)
    if not hasattr(value, "__len__") or not all(is_int(v) for v in value):
        raise InvalidInputError(f"{what} is neither text nor a row of integer token ids")
    return torch.tensor([int(v) for v in value], dtype=torch.int64)
