"""Prompt layouts: the ids before and after the slots when the decoder is prompted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from icae_fast.core.core import ICAECore
from icae_fast.core.inputs import Context, Vocabulary, to_ids
from icae_fast.core.tokens import encode_template, encode_text, is_mistral_common, spells_control_tokens
from icae_fast.errors import TokenizerMismatchError

_CONTENT = "\u2063icae-content\u2063"  # invisible separators, which no template's own text contains
_ANSWER = "\u2063icae-answer\u2063"

# A template that writes today's date would change the prefix each day, and with it all keys and values behind it. This
# is the date of Llama 3's templates where they are told none.
FIXED_DATE = datetime(2024, 7, 26)
# Transformers lets no function through to a template, so the one for today's date is shadowed by a macro in front.
_FORMS = {f"%{form}": FIXED_DATE.strftime(f"%{form}") for form in "aAbBdHjmMSxXyY"}
# Forms that strftime has on some systems.
_FORMS |= {"%F": "2024-07-26", "%-d": "26", "%-m": "7"}
_DATED = (
    "{%- macro strftime_now(form) -%}{%- if date_string is defined -%}{{ date_string }}{%- else -%}{{ form"
    + "".join(f" | replace('{form}', '{text}')" for form, text in _FORMS.items())
    + " }}{%- endif -%}{%- endmacro %}{{ '' }}"
)


def chat_template_ids(tokenizer: Any, variables: Mapping[str, Any] | None = None) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer's chat template puts before and after a user's message.

    Blanks where the template meets the message are dropped, because they belong to the message's first token
    (`<s>[INST]` and `[/INST]` for Mistral, the ids that the reference writes out). A template that asks for today's
    date gets `FIXED_DATE`, or the variable `date_string`.

    Args:
        tokenizer: of the base model, or None.
        variables: further variables of the template, `ICAE.chat_template_kwargs`.

    Returns:
        (prefix, suffix), both empty without a tokenizer or without a template.

    Raises:
        TokenizerMismatchError: the template fails, or does not repeat the message word for word.
    """
    if tokenizer is None:
        return [], []
    message = [{"role": "user", "content": _CONTENT}]
    if is_mistral_common(tokenizer):
        return _around(_mistral_ids(tokenizer, message, variables), tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        return [], []
    text = _rendered(tokenizer, message, variables, add_generation_prompt=True)
    prefix, found, suffix = text.partition(_CONTENT)
    if not found:
        raise TokenizerMismatchError(_CHANGED)
    return encode_template(tokenizer, prefix.rstrip(" ")), encode_template(tokenizer, suffix.lstrip(" "))


_CHANGED = (
    "the tokenizer's chat template changes the message, so the slots cannot be put in its place; set "
    "ICAEConfig.prompt_format to 'plain'"
)


def _rendered(
    tokenizer: Any, messages: list[dict[str, str]], variables: Mapping[str, Any] | None, **options: bool
) -> str:
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _DATED + template
        return tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=template, **options, **(variables or {})
        )
    except Exception as error:  # a template is a program, which may fail in any way
        raise _failed(error) from error


def _mistral_ids(tokenizer: Any, messages: list[dict[str, str]], variables: Mapping[str, Any] | None) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **(variables or {})))
    except Exception as error:  # mistral-common has errors of its own
        raise _failed(error) from error


def _failed(error: Exception) -> TokenizerMismatchError:
    cause = str(error).strip().partition("\n")[0] or type(error).__name__
    return TokenizerMismatchError(
        f"the tokenizer's chat template cannot be used ({cause}); repair it, set icae.chat_template_kwargs, or set "
        "ICAEConfig.prompt_format to 'plain'"
    )


def _around(ids: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids before and after those of `_CONTENT`."""
    content = encode_text(tokenizer, _CONTENT, "the message", add_special_tokens=False)
    for start in range(len(ids) - len(content) + 1):
        if ids[start : start + len(content)] == content:
            return ids[:start], ids[start + len(content) :]
    raise TokenizerMismatchError(_CHANGED)


def message_ids(tokenizer: Any, message: str) -> list[int]:
    """Return the ids of a user's message in the chat template, in which only the template's control tokens are some.

    Without a template, the message with the tokenizer's own special tokens is followed by an empty line.

    Args:
        tokenizer: of a chat model.
        message: a text.

    Raises:
        InvalidInputError, TokenizerMismatchError: see `encode_text` and `chat_template_ids`.
    """
    if is_mistral_common(tokenizer):
        return _mistral_ids(tokenizer, [{"role": "user", "content": message}], None)
    if not getattr(tokenizer, "chat_template", None):
        return encode_text(tokenizer, message + "\n\n", "the message", add_special_tokens=True)
    if spells_control_tokens(tokenizer, message):  # as text, it cannot be written into the template's text
        before, after = chat_template_ids(tokenizer)
        return before + encode_text(tokenizer, message, "the message", add_special_tokens=False) + after
    text = _rendered(tokenizer, [{"role": "user", "content": message}], None, add_generation_prompt=True)
    return encode_template(tokenizer, text)


def end_id(core: ICAECore) -> int | None:
    """Return the id that ends an answer in training: what the chat template writes behind one, if it ends a row.

    Without a template it is the first of `eos_token_ids`; None if there is none.

    Raises:
        TokenizerMismatchError: the chat template cannot be used.
    """
    ends, tokenizer = core.eos_token_ids, core.tokenizer
    if len(ends) > 1 and core.config.prompt_format == "chat" and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _ANSWER}]
        behind = _rendered(tokenizer, turns, core.chat_template_kwargs).partition(_ANSWER)[2]
        ends = (*(i for i in encode_template(tokenizer, behind.lstrip(" ")) if i in ends), *ends)
    return next(iter(ends), None)


def layout_ids(
    prompt: list[int],
    tokenizer: Any,
    vocabulary: Vocabulary,
    prompt_format: str,
    leading: Sequence[int] = (),
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """Return the ids before and after the slots for one prompt, by the config's format (see `ICAEConfig`).

    Args:
        prompt: ids of the prompt.
        tokenizer: has the chat template.
        vocabulary: has the id of FT.
        prompt_format: of the config.
        leading: ids before the slots where no template puts any.
        variables: variables of the template.

    Returns:
        (prefix, suffix): the decoder reads `prefix, slots, suffix`.
    """
    if prompt_format == "v1":
        return list(leading), [vocabulary.ft, *prompt, vocabulary.ft]
    before, after = chat_template_ids(tokenizer, variables) if prompt_format == "chat" else ([], [])
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
    ids = to_ids(prompt, core.tokenizer, "the prompt", add_special_tokens=False, special_tokens=core.special_tokens)
    return core.vocabulary.check_context(ids, "the prompt").tolist()


def place_prompt(core: ICAECore, ids: list[int]) -> tuple[list[int], list[int]]:
    """Lay out the ids of a prompt for this model; see `layout_ids`."""
    return layout_ids(
        ids, core.tokenizer, core.vocabulary, core.config.prompt_format, core.leading_ids, core.chat_template_kwargs
    )
