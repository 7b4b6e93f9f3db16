"""Writing from memories: restoring contexts and answering prompts, whole or piece by piece.

All rows of a call decode in one batch. Rows of one memory share its keys and values, and a row leaves the batch as soon
as it ends. A token step costs one host synchronisation, which reads the chosen ids.

Every function takes the fields of `icae_fast.generation.sampling.GenerationOptions` as keyword arguments:
`do_sample`, `temperature`, `top_k`, `top_p`, `seed`, `repetition_penalty`, `stop_strings`, `eos_token_id`,
`logits_processor` and `stopping_criteria`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from icae_fast.checks import is_int
from icae_fast.core.core import ICAECore
from icae_fast.core.inputs import Context, as_list
from icae_fast.core.memory import Memory
from icae_fast.core.trained import warn_beyond_training
from icae_fast.errors import InvalidInputError, TokenizerMismatchError
from icae_fast.generation.answers import Answer, AnswerBatch, FinishReason, Row
from icae_fast.generation.prompts import own_prompt_ids, place_prompt
from icae_fast.generation.sampling import GenerationOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from icae_fast.generation.sampling import GenerationKwargs, RestoreKwargs

Memories = Memory | Sequence[Memory]
Prompts = Context | Sequence[Context]


class TextPiece(NamedTuple):
    """One piece of one row's answer, as `ICAE.stream` yields it.

    Args:
        row: index of the prompt that it answers.
        text: whole characters; empty only in a row's last piece.
        finish_reason: as in `Answer` in a row's last piece, None before.
    """

    row: int
    text: str
    finish_reason: FinishReason | None


@overload
def generate(
    core: ICAECore, memory: Memories, prompts: Prompts, max_new_tokens: int = ..., min_new_tokens: int = ...,
    return_ids: Literal[False] = ..., streamer: Any = ..., **options: Unpack[GenerationKwargs],
) -> list[str]: ...  # fmt: skip
@overload
def generate(
    core: ICAECore, memory: Memories, prompts: Prompts, max_new_tokens: int = ..., min_new_tokens: int = ..., *,
    return_ids: Literal[True], streamer: Any = ..., **options: Unpack[GenerationKwargs],
) -> list[list[int]]: ...  # fmt: skip
@overload
def generate(
    core: ICAECore, memory: Memories, prompts: Prompts, max_new_tokens: int = ..., min_new_tokens: int = ...,
    return_ids: bool = ..., streamer: Any = ..., **options: Unpack[GenerationKwargs],
) -> list[str] | list[list[int]]: ...  # fmt: skip
def generate(
    core: ICAECore, memory: Memories, prompts: Prompts, max_new_tokens: int = 128, min_new_tokens: int = 0,
    return_ids: bool = False, streamer: Any = None, **options: Unpack[GenerationKwargs],
) -> list[str] | list[list[int]]:  # fmt: skip
    """Answer prompts about memories.

    With several memories, prompt i is about memory i. A single memory goes with all prompts, and a single prompt
    with all memories.

    Args:
        memory: one memory of this model, or a list.
        prompts: a text, a row of ids, or a list of those; laid out by the config's `prompt_format`.
        max_new_tokens: the most tokens of an answer.
        min_new_tokens: number of tokens before which no end-of-sequence token may come; a stop string may.
        return_ids: return ids even if there is a tokenizer.
        streamer: a transformers streamer, for a single row. It receives every token, those of stop strings included,
            in groups of a thirtieth of a second. One with `skip_prompt` receives the prompt's ids first, as it expects.
        options: see `GenerationOptions`; greedy by default.

    Returns:
        An answer for each row: text, or ids that end with the end-of-sequence token if the row ended with one.

    Raises:
        InvalidInputError: no prompt, an empty one, ids out of range, a memory of another model, numbers of prompts and
            memories that do not fit, or an option that is unknown or out of range.
        ContextTooLongError: slots, prompt and answer exceed the base model's positions.
        TokenizerMismatchError: text without a tokenizer.
        NonFiniteError: logits hold NaN, or processors leave no token to choose.
    """
    if not return_ids:
        _check_has_tokenizer(core)
    answers = answer(core, memory, prompts, max_new_tokens, min_new_tokens, streamer, **options)
    return _written(answers, return_ids)


def answer(
    core: ICAECore, memory: Memories, prompts: Prompts, max_new_tokens: int = 128, min_new_tokens: int = 0,
    streamer: Any = None, **options: Unpack[GenerationKwargs],
) -> list[Answer]:  # fmt: skip
    """Answer prompts, with ids, text and finish reason of each row; arguments and errors as `generate`."""
    rows = _rows(core, memory, prompts, max_new_tokens)
    return AnswerBatch(core, rows, min_new_tokens, GenerationOptions.of(options), streamer).finish()


def stream(
    core: ICAECore, memory: Memories, prompts: Prompts, max_new_tokens: int = 128, min_new_tokens: int = 0,
    **options: Unpack[GenerationKwargs],
) -> Iterator[TextPiece]:  # fmt: skip
    """Answer prompts piece by piece: yield a row's text as soon as it is certain, rows as they advance.

    Pieces hold whole characters and no part of a stop string. The pieces of a row add up to what `generate` returns
    (`IncrementalText` documents an exception: invalid bytes of tokenizers with byte fallback). The call itself checks
    the arguments; decoding runs only while the iterator is read.

    Raises:
        InvalidInputError, ContextTooLongError, TokenizerMismatchError, NonFiniteError: as `generate`.
    """
    _check_has_tokenizer(core)
    rows = _rows(core, memory, prompts, max_new_tokens)
    steps = AnswerBatch(core, rows, min_new_tokens, GenerationOptions.of(options), incremental=True).run()
    return (TextPiece(row.index, piece, row.reason) for row, piece in steps if piece or row.reason)


@overload
def restore(
    core: ICAECore, memory: Memory, max_new_tokens: int | None = ..., min_new_tokens: int = ...,
    return_ids: Literal[False] = ..., streamer: Any = ..., **options: Unpack[GenerationKwargs],
) -> str: ...  # fmt: skip
@overload
def restore(
    core: ICAECore, memory: Memory, max_new_tokens: int | None = ..., min_new_tokens: int = ..., *,
    return_ids: Literal[True], streamer: Any = ..., **options: Unpack[GenerationKwargs],
) -> list[int]: ...  # fmt: skip
@overload
def restore(
    core: ICAECore, memory: Sequence[Memory], max_new_tokens: int | None = ..., min_new_tokens: int = ...,
    return_ids: Literal[False] = ..., streamer: Any = ..., **options: Unpack[GenerationKwargs],
) -> list[str]: ...  # fmt: skip
@overload
def restore(
    core: ICAECore, memory: Sequence[Memory], max_new_tokens: int | None = ..., min_new_tokens: int = ..., *,
    return_ids: Literal[True], streamer: Any = ..., **options: Unpack[GenerationKwargs],
) -> list[list[int]]: ...  # fmt: skip
@overload
def restore(
    core: ICAECore, memory: Memories, max_new_tokens: int | None = ..., min_new_tokens: int = ...,
    return_ids: bool = ..., streamer: Any = ..., **options: Unpack[GenerationKwargs],
) -> str | list[int] | list[str] | list[list[int]]: ...  # fmt: skip
def restore(
    core: ICAECore, memory: Memories, max_new_tokens: int | None = None, min_new_tokens: int = 0,
    return_ids: bool = False, streamer: Any = None, **options: Unpack[GenerationKwargs],
) -> str | list[int] | list[str] | list[list[int]]:  # fmt: skip
    """Write out the contexts of memories (autoencoding), from `[leading_ids, slots, AE]`.

    Args:
        memory: one memory of this model, or a list.
        max_new_tokens: None for the context's length and 16 more, within the base model's positions.
        min_new_tokens, return_ids, streamer, options: as for `generate`.

    Returns:
        Text, or ids that end with the end-of-sequence token if the row ended with one; a list for a list of memories.

    Raises:
        InvalidInputError, ContextTooLongError, TokenizerMismatchError, NonFiniteError: as `generate`.
    """
    memories = _memories(core, memory)
    warn_beyond_training(core, (m.span_lengths for m in memories))
    if not return_ids:
        _check_has_tokenizer(core)
    leading = list(core.leading_ids)

    def limit(m: Memory) -> int:
        room = max(1, core.max_positions - len(leading) - m.n_slots - 1)
        least = min_new_tokens if is_int(min_new_tokens) else 0  # anything else is refused below
        return max(least, min(m.n_source_tokens + 16, room))

    rows = [
        Row(i, m, leading, [core.vocabulary.ae], [], limit(m) if max_new_tokens is None else max_new_tokens)
        for i, m in enumerate(memories)
    ]
    answers = AnswerBatch(core, rows, min_new_tokens, GenerationOptions.of(options), streamer).finish()
    results = _written(answers, return_ids)
    return results[0] if isinstance(memory, Memory) else results


@overload
def restore_by_span(
    core: ICAECore, memory: Memory, return_ids: Literal[False] = ..., **options: Unpack[RestoreKwargs]
) -> str: ...
@overload
def restore_by_span(
    core: ICAECore, memory: Memory, return_ids: Literal[True], **options: Unpack[RestoreKwargs]
) -> list[int]: ...
@overload
def restore_by_span(
    core: ICAECore, memory: Sequence[Memory], return_ids: Literal[False] = ..., **options: Unpack[RestoreKwargs]
) -> list[str]: ...
@overload
def restore_by_span(
    core: ICAECore, memory: Sequence[Memory], return_ids: Literal[True], **options: Unpack[RestoreKwargs]
) -> list[list[int]]: ...
@overload
def restore_by_span(
    core: ICAECore, memory: Memories, return_ids: bool = ..., **options: Unpack[RestoreKwargs]
) -> str | list[int] | list[str] | list[list[int]]: ...
def restore_by_span(
    core: ICAECore, memory: Memories, return_ids: bool = False, **options: Unpack[RestoreKwargs]
) -> str | list[int] | list[str] | list[list[int]]:
    """Write out the contexts of memories, each span from its own slots only.

    Spans were compressed one by one, and each is restored as if it were the whole context; all spans of all memories
    are rows of one batch. This suits long texts and an adapter that saw few spans in training, unlike reading all
    slots at once (`restore`, the reference's way): of "smollm2-135m", 8 held-out passages of 512 tokens in 256 slots
    came back with a BLEU of 0.97, and of 0.20 from all slots at once.

    Args:
        memory: one memory of this model, or a list.
        return_ids: return ids without an end of sequence, at most as many as the context has, instead of text.
        options: arguments of `restore` and fields of `GenerationOptions`.

    Returns:
        Text or ids; a list for a list of memories.

    Raises:
        InvalidInputError, ContextTooLongError, TokenizerMismatchError, NonFiniteError: as `generate`.
    """
    memories = _memories(core, memory)
    if not return_ids:
        _check_has_tokenizer(core)
    spans = [m.spans() for m in memories]
    written = iter(restore(core, [span for of_memory in spans for span in of_memory], return_ids=True, **options))
    results: list[Any] = []
    for of_memory in spans:
        ids: list[int] = []
        for span in of_memory:
            own = next(written)
            ends = own and own[-1] in core.eos_token_ids
            ids += own[: len(own) - bool(ends)][: span.n_source_tokens]
        results.append(ids if return_ids else core.tokenizer.decode(ids, skip_special_tokens=True))
    return results[0] if isinstance(memory, Memory) else results


def _written(answers: list[Answer], return_ids: bool) -> Any:
    return [a.ids if return_ids else a.text for a in answers]


def _memories(core: ICAECore, memory: Memories) -> list[Memory]:
    memories: list[Any] = list(memory) if isinstance(memory, (list, tuple)) else [memory]
    if not memories:
        raise InvalidInputError("the list of memories is empty; give at least one")
    for m in {id(m): m for m in memories}.values():
        core.check_memory(m)
    return memories


def _rows(core: ICAECore, memory: Memories, prompts: Prompts, max_new_tokens: int) -> list[Row]:
    memories = _memories(core, memory)
    warn_beyond_training(core, (m.span_lengths for m in memories))
    asked = [own_prompt_ids(core, p) for p in as_list(prompts)]
    n = max(len(memories), len(asked))
    if {len(memories), len(asked)} - {1, n}:
        raise InvalidInputError(
            f"there are {len(memories)} memories and {len(asked)} prompts; give a prompt for each memory, one "
            "prompt for all, or one memory"
        )
    memories = memories * n if len(memories) == 1 else memories
    asked = asked * n if len(asked) == 1 else asked
    return [
        Row(i, m, *place_prompt(core, ids), ids, max_new_tokens)
        for i, (m, ids) in enumerate(zip(memories, asked, strict=True))
    ]


def _check_has_tokenizer(core: ICAECore) -> None:
    if core.tokenizer is None:
        raise TokenizerMismatchError("there is no tokenizer to write text with; pass return_ids=True or tokenizer=")
