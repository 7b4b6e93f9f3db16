"""Writing from memories: restoring contexts and answering prompts, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from icae_fast.core.inputs import Context, as_list, is_int, to_ids
from icae_fast.core.memory import Memory
from icae_fast.errors import InvalidInputError, TokenizerMismatchError
from icae_fast.generation import prompts as layouts
from icae_fast.generation.answers import Answer, AnswerBatch, FinishReason, Row
from icae_fast.generation.sampling import GenerationOptions

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE


class TextPiece(NamedTuple):
    """A piece of one row's answer, as `ICAE.stream` gives it.

    Args:
        row: which prompt it answers, counted from 0.
        text: whole characters; empty at most in a row's last piece.
        finish_reason: as in `Answer` in a row's last piece, None before.
    """

    row: int
    text: str
    finish_reason: FinishReason | None


class GenerationMixin:
    """What an `ICAE` writes: `generate`, `answer`, `stream` and `restore`.

    All rows of a call decode in one batch. Rows of one memory share what the decoder reads of it, and a row leaves the
    batch as soon as it ends. A token costs one host synchronisation, which reads the chosen ids.

    Every method takes the fields of `icae_fast.generation.sampling.GenerationOptions` as keyword arguments:
    `do_sample`,
    `temperature`, `top_k`, `top_p`, `seed`, `repetition_penalty`, `stop_strings`, `eos_token_id`, `logits_processor`
    and `stopping_criteria`.
    """

    def generate(
        self: ICAE,
        memory: Memory | Sequence[Memory],
        prompts: Context | Sequence[Context],
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        return_ids: bool = False,
        streamer: Any = None,
        **options: Any,
    ) -> list[str] | list[list[int]]:
        """Answer prompts about memories.

        With several memories, prompt i is about memory i. Where there is one of either, it goes with all of the
        other: many prompts about one memory, or one prompt about many.

        Args:
            memory: of this model, one or a list.
            prompts: a text, a row of ids, or a list of those; laid out by the config's `prompt_format`.
            max_new_tokens: the most tokens of an answer.
            min_new_tokens: tokens before which no end-of-sequence token may come; a stop string may.
            return_ids: give ids even if there is a tokenizer.
            streamer: a transformers streamer, for a single row. It gets every token, of stop strings too, those of a
                thirtieth of a second together; one with `skip_prompt` gets the prompt's ids first, as it expects.
            options: see `GenerationOptions`; greedy by default.

        Returns:
            An answer for each row: text, or ids, the end-of-sequence token last if it came to one.

        Raises:
            InvalidInputError: no or an empty prompt, ids out of range, a memory of another model, other numbers of
                prompts than of memories, or an option that is out of range or unknown.
            ContextTooLongError: slots, prompt and answer would pass the base model's positions.
            TokenizerMismatchError: text without a tokenizer.
            NonFiniteError: logits hold NaN, or processors leave nothing to choose from.
        """
        if not return_ids:
            self._check_has_tokenizer()
        answers = self.answer(memory, prompts, max_new_tokens, min_new_tokens, streamer, **options)
        return [a.ids if return_ids else a.text for a in answers]

    def answer(
        self: ICAE,
        memory: Memory | Sequence[Memory],
        prompts: Context | Sequence[Context],
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        streamer: Any = None,
        **options: Any,
    ) -> list[Answer]:
        """`generate` with ids, text and the reason of ending of each row; arguments and errors are the same."""
        rows = self._rows(memory, prompts, max_new_tokens)
        return AnswerBatch(self, rows, min_new_tokens, GenerationOptions.of(options), streamer).finish()

    def stream(
        self: ICAE,
        memory: Memory | Sequence[Memory],
        prompts: Context | Sequence[Context],
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        **options: Any,
    ) -> Iterator[TextPiece]:
        """`generate` piece by piece: yields a row's text as soon as it is certain, rows as they come.

        Pieces hold whole characters and no part of a stop string; those of a row add up to what `generate` gives
        (`IncrementalText` tells of an exception, invalid bytes of tokenizers with byte fallback).
        Arguments are checked by the call itself, and decoding goes on only while the iterator is read.

        Raises:
            InvalidInputError, ContextTooLongError, TokenizerMismatchError, NonFiniteError: as `generate`.
        """
        self._check_has_tokenizer()
        rows = self._rows(memory, prompts, max_new_tokens)
        steps = AnswerBatch(self, rows, min_new_tokens, GenerationOptions.of(options), incremental=True).run()
        return (TextPiece(row.index, piece, row.reason) for row, piece in steps if piece or row.reason)

    def restore(
        self: ICAE,
        memory: Memory | Sequence[Memory],
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        return_ids: bool = False,
        streamer: Any = None,
        **options: Any,
    ) -> str | list[int] | list[str] | list[list[int]]:
        """Write out the contexts that memories hold (autoencoding), from `[leading_ids, slots, AE]`.

        Args:
            memory: of this model, one or a list.
            max_new_tokens: by default the context's length and 16 more, or as many as the base model has positions.
            min_new_tokens, return_ids, streamer, options: as of `generate`.

        Returns:
            Text, or ids, the end-of-sequence token last if it came to one; a list of those for a list of memories.

        Raises:
            InvalidInputError, ContextTooLongError, TokenizerMismatchError, NonFiniteError: as `generate`.
        """
        memories = self._memories(memory)
        if not return_ids:
            self._check_has_tokenizer()

        leading = list(self.leading_ids)

        def limit(m: Memory) -> int:
            room = max(1, self.max_positions - len(leading) - m.n_slots - 1)
            least = min_new_tokens if is_int(min_new_tokens) else 0  # anything else is refused below
            return max(least, min(m.n_source_tokens + 16, room))

        rows = [
            Row(i, m, leading, [self.vocabulary.ae], [], limit(m) if max_new_tokens is None else max_new_tokens)
            for i, m in enumerate(memories)
        ]
        answers = AnswerBatch(self, rows, min_new_tokens, GenerationOptions.of(options), streamer).finish()
        results = [a.ids if return_ids else a.text for a in answers]
        return results[0] if isinstance(memory, Memory) else results

    def restore_by_span(
        self: ICAE, memory: Memory | Sequence[Memory], return_ids: bool = False, **options: Any
    ) -> str | list[int] | list[str] | list[list[int]]:
        """Write out the contexts that memories hold, each span behind its own slots alone.

        Spans were compressed one by one, and each is restored as if it were the whole context: all spans of all
        memories are rows of one batch. An adapter that has seen few spans in training restores long texts this way,
        and not from all slots at once (`restore`, the reference's way): of "smollm2-135m", 8 held-out passages of 512
        tokens in 256 slots came back with a BLEU of 0.97, and of 0.20 from all slots at once.

        Args:
            memory: of this model, one or a list.
            return_ids: give ids instead of text, without an end of sequence, at most as many as the context has.
            options: as of `generate`.

        Returns:
            Text or ids; a list of those for a list of memories.

        Raises:
            InvalidInputError, ContextTooLongError, TokenizerMismatchError, NonFiniteError: as `generate`.
        """
        memories = self._memories(memory)
        if not return_ids:
            self._check_has_tokenizer()
        spans = [m.spans() for m in memories]
        written = iter(self.restore([span for of_memory in spans for span in of_memory], return_ids=True, **options))
        results = []
        for of_memory in spans:
            ids: list[int] = []
            for span in of_memory:
                own = next(written)
                ends = own and own[-1] in self.eos_token_ids
                ids += own[: len(own) - bool(ends)][: span.n_source_tokens]
            results.append(ids if return_ids else self.tokenizer.decode(ids, skip_special_tokens=True))
        return results[0] if isinstance(memory, Memory) else results

    def prompt_ids(self: ICAE, prompt: Context) -> tuple[list[int], list[int]]:
        """Ids before and after the slots when `prompt` is asked: the decoder reads `prefix, slots, suffix`.

        Raises:
            InvalidInputError, TokenizerMismatchError: the prompt is empty, out of range, or text without a
                tokenizer.
        """
        return self._layout(self._own_prompt_ids(prompt))

    def _own_prompt_ids(self: ICAE, prompt: Context) -> list[int]:
        ids = to_ids(prompt, self.tokenizer, "the prompt", add_special_tokens=False)
        return self.vocabulary.check_context(ids, "the prompt").tolist()

    def _layout(self: ICAE, ids: list[int]) -> tuple[list[int], list[int]]:
        return layouts.prompt_ids(ids, self.tokenizer, self.vocabulary, self.config.prompt_format, self.leading_ids)

    def _memories(self: ICAE, memory: Memory | Sequence[Memory]) -> list[Memory]:
        memories = list(memory) if isinstance(memory, (list, tuple)) else [memory]
        if not memories:
            raise InvalidInputError("the list of memories is empty; give at least one")
        for m in {id(m): m for m in memories}.values():
            self._check_memory(m)
        return memories

    def _rows(self: ICAE, memory, prompts, max_new_tokens: int) -> list[Row]:
        memories, asked = self._memories(memory), [self._own_prompt_ids(p) for p in as_list(prompts)]
        n = max(len(memories), len(asked))
        if {len(memories), len(asked)} - {1, n}:
            raise InvalidInputError(
                f"there are {len(memories)} memories and {len(asked)} prompts; give a prompt for each memory, one "
                "prompt for all, or one memory"
            )
        memories, asked = (x * n if len(x) == 1 else x for x in (memories, asked))
        return [
            Row(i, m, *self._layout(ids), ids, max_new_tokens)
            for i, (m, ids) in enumerate(zip(memories, asked, strict=True))
        ]

    def _check_has_tokenizer(self: ICAE) -> None:
        if self.tokenizer is None:
            raise TokenizerMismatchError("there is no tokenizer to write text with; pass return_ids=True or tokenizer=")
