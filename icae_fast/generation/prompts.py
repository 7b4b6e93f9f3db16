"""Prompt layouts: the ids before and after the slots when the decoder is prompted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icae_fast.core.core import ICAECore
from icae_fast.core.inputs import Context, Vocabulary, to_ids
from icae_fast.errors import TokenizerMismatchError

_CONTENT = "\u2063icae-content\u2063"  # invisible separators, which no template's own text contains


def chat_template_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer's chat template puts before and after a user's message.

    Blanks where the template meets the message are dropped, because they belong to the message's first token
    (`<s>[INST]` and `[/INST]` for Mistral, the ids that the reference writes out).

    Args:
        tokenizer: of the base model, or None.

    Returns:
        (prefix, suffix), both empty without a tokenizer or without a template.

    Raises:
        TokenizerMismatchError: the template does not repeat the message word for word.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return [], []
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _CONTENT}], tokenize=False, add_generation_prompt=True
    )
    prefix, found, suffix = text.partition(_CONTENT)
    if not found:
        raise TokenizerMismatchError(
            "the tokenizer's chat template changes the message, so the slots cannot be put in its place; set "
            "ICAEConfig.prompt_format to 'plain'"
        )
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prefix.rstrip(" "), suffix.lstrip(" "))
    )
    return before, after


def layout_ids(
    prompt: list[int], tokenizer: Any, vocabulary: Vocabulary, prompt_format: str, leading: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Return the ids before and after the slots for one prompt, by the config's format (see `ICAEConfig`).

    Args:
        prompt: ids of the prompt.
        tokenizer: has the chat template.
        vocabulary: has the id of FT.
        prompt_format: of the config.
        leading: ids before the slots where no template puts any.

    Returns:
        (prefix, suffix): the decoder reads `prefix, slots, suffix`.
    """
    if prompt_format == "v1":
        return list(leading), [vocabulary.ft, *prompt, vocabulary.ft]
    before, after = chat_template_ids(tokenizer) if prompt_format == "chat" else ([], [])
    return list(before or leading), [vocabulary.ft, *prompt, *after]


def prompt_ids(core: ICAECore, prompt: Context) -> tuple[list[int], list[int]]:
    """Return the ids before and after the slots of a prompt: the decoder reads `prefix, slots, suffix`.

    Args:
        prompt: a text or a row of ids.

    Raises:
        InvalidInputError, TokenizerMismatchError: the prompt is empty, out of range, or text without a tokenizer.
    """
    return place_prompt(core, own_prompt_ids(core, prompt))


def prefix_ids(core: ICAECore) -> tuple[int, ...]:
    """Return the ids that `generate` puts before the slots, by the config's `prompt_format` and the chat template.

    Raises:
        TokenizerMismatchError: the chat template cannot be used.
    """
    return tuple(place_prompt(core, [])[0])


def own_prompt_ids(core: ICAECore, prompt: Context) -> list[int]:
    """Return the checked ids of a prompt, without template and special tokens."""
    ids = to_ids(prompt, core.tokenizer, "the prompt", add_special_tokens=False)
    return core.vocabulary.check_context(ids, "the prompt").tolist()


def place_prompt(core: ICAECore, ids: list[int]) -> tuple[list[int], list[int]]:
    """Lay out the ids of a prompt for this model; see `layout_ids`."""
    return layout_ids(ids, core.tokenizer, core.vocabulary, core.config.prompt_format, core.leading_ids)
