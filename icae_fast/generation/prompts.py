"""What stands before and after the slots when the decoder is asked something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icae_fast.core.inputs import Vocabulary
from icae_fast.errors import TokenizerMismatchError

_CONTENT = "\u2063icae-content\u2063"  # invisible separators, so that no template's own text can hold it


def chat_template_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer's chat template puts before and after a user's message.

    Blanks where the template meets the message are dropped: they belong to the message's first token
    (`<s>[INST]` and `[/INST]` for Mistral, the ids that the reference writes out).

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
    return tuple(
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prefix.rstrip(" "), suffix.lstrip(" "))
    )


def prompt_ids(
    prompt: list[int], tokenizer: Any, vocabulary: Vocabulary, prompt_format: str, leading: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Ids before and after the slots for one prompt, by the config's format (see `ICAEConfig`).

    Args:
        prompt: its ids.
        tokenizer: gives the template.
        vocabulary: gives FT.
        prompt_format: the config's.
        leading: ids before the slots where no template puts any.

    Returns:
        (prefix, suffix): the decoder reads `prefix, slots, suffix`.
    """
    if prompt_format == "v1":
        return list(leading), [vocabulary.ft, *prompt, vocabulary.ft]
    before, after = chat_template_ids(tokenizer) if prompt_format == "chat" else ([], [])
    return list(before or leading), [vocabulary.ft, *prompt, *after]
