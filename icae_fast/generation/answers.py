"""The rows of one call, decoded together until each has ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from icae_fast.backbone.modes import in_own_modes
from icae_fast.checks import is_int, is_out_of_memory
from icae_fast.core.memory import Memory
from icae_fast.errors import ContextTooLongError, InvalidInputError, NonFiniteError, TokenizerMismatchError
from icae_fast.generation.admission import admitted
from icae_fast.generation.decoding import DecodeSession
from icae_fast.generation.detokenize import StoppableText, hidden_tokens
from icae_fast.generation.memory_kv import memory_pieces
from icae_fast.generation.sampling import GenerationOptions, TokenChooser

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore

FinishReason = Literal["eos", "stop", "length"]

# Returning to Python takes 0.2 to 0.5 ms, a token step of SmolLM2 6 to 9 ms. Until it returns, no interrupt is handled
# and no token is streamed; a stream looks smooth at 30 steps a second or more.
STEPS_AHEAD = 8
SECONDS_AHEAD, SECONDS_AHEAD_OF_A_STREAM = 1 / 10, 1 / 30


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Args:
        ids: the new token ids; the last is the end-of-sequence token if the row ended with one.
        text: text of the ids without special tokens, cut before a stop string; None without a tokenizer.
        finish_reason: "eos" for an end-of-sequence token, "stop" for a stop string or stopping criterion, "length"
            for `max_new_tokens`.
    """

    ids: list[int]
    text: str | None
    finish_reason: FinishReason


@dataclass(eq=False)
class Row:
    """A row that is being decoded: the decoder reads `prefix, slots of the memory, suffix`, then the new ids."""

    index: int
    memory: Memory
    prefix: list[int]
    suffix: list[int]
    prompt: list[int]  # the user's part of the suffix
    limit: int  # most new tokens
    ids: list[int] = field(default_factory=list)
    text: StoppableText | None = None  # set where text is decoded incrementally
    reason: FinishReason | None = None

    def push(self, token: int, is_eos: bool, stopped: bool) -> str:
        """Append a token, set `reason` if it is the last one, and return the text that has become certain."""
        self.ids.append(token)
        piece = self.text.push(token) if self.text and not is_eos else ""
        if is_eos:
            self.reason = "eos"
        elif stopped or (self.text and self.text.stopped):
            self.reason = "stop"
        elif len(self.ids) == self.limit:
            self.reason = "length"
        return piece + self.text.finish() if self.text and self.reason else piece

    def answer(self, tokenizer: Any) -> Answer:
        """Return the finished answer."""
        if self.text is not None:
            text = self.text.text
        elif tokenizer is not None:
            shown = self.ids[:-1] if self.reason == "eos" else self.ids
            text = tokenizer.decode(shown, skip_special_tokens=True)
        else:
            text = None
        assert self.reason is not None  # the row has ended
        return Answer(self.ids, text, self.reason)


class AnswerBatch:
    """The rows of one call with their options, checked before anything is computed."""

    def __init__(
        self, core: ICAECore, rows: list[Row], min_new_tokens: int, options: GenerationOptions, streamer: Any = None,
        incremental: bool = False,
    ) -> None:  # fmt: skip
        self.core, self.rows, self.streamer = core, rows, streamer
        self.eos = options.eos_ids(core.eos_token_ids, core.vocabulary.n_base)
        self._check(min_new_tokens, options.stop_strings)
        self._options, self._least = options, min_new_tokens
        # Drawn for all rows at once, so that a row's seed does not depend on the group that it decodes in.
        self._seeds = options.row_seeds(len(rows)) if options.do_sample else None
        self._stop_strings = bool(options.stop_strings)
        # Time limit of one greedy call, and the measured time of a step; no step has been measured yet.
        self._seconds = SECONDS_AHEAD if streamer is None and not incremental else SECONDS_AHEAD_OF_A_STREAM
        self._seconds_a_step = self._seconds
        if options.stop_strings or incremental:
            for row in rows:
                row.text = StoppableText(core.tokenizer, options.stop_strings)

    def _check(self, least: int, stop_strings: Sequence[str]) -> None:
        core, rows = self.core, self.rows
        for most in {r.limit for r in rows}:
            if not (is_int(least) and is_int(most) and 0 <= least <= most):
                raise InvalidInputError(
                    f"min_new_tokens={least} and max_new_tokens={most}: give 0 <= min <= max, whole numbers"
                )
        if self.streamer is not None and len(rows) > 1:
            raise InvalidInputError(f"a streamer shows one row and there are {len(rows)} prompts; pass one prompt")
        read = {r.index: len(r.prefix) + r.memory.n_slots + len(r.suffix) for r in rows}
        longest = max(rows, key=lambda r: read[r.index] + r.limit)
        if read[longest.index] + longest.limit > core.max_positions:
            raise ContextTooLongError(
                f"slots and prompt take {read[longest.index]} positions and max_new_tokens={longest.limit} more, but "
                f"the base model has {core.max_positions}; ask for fewer tokens, or set icae.max_positions higher if "
                "it extrapolates"
            )
        if stop_strings and core.tokenizer is None:
            raise TokenizerMismatchError("stop_strings are text, but there is no tokenizer; pass tokenizer=")
        hidden = sorted(hidden_tokens(core.tokenizer)) if stop_strings else ()
        for text in stop_strings:
            if special := next((t for t in hidden if t in text), None):
                raise InvalidInputError(
                    f"the stop string {text!r} holds the special token {special!r}, which text does not show; give its "
                    "id as eos_token_id"
                )

    def finish(self) -> list[Answer]:
        """Decode all rows and return their answers."""
        for _ in self.run():
            pass
        return [row.answer(self.core.tokenizer) for row in self.rows]

    @torch.no_grad()
    def run(self) -> Iterator[tuple[Row, str]]:
        """Decode all rows; yield each active row after each of its tokens, with the text that has become certain.

        A row whose `reason` is set has ended and is not yielded again.
        """
        if self.streamer is not None and getattr(self.streamer, "skip_prompt", False):
            self.streamer.put(torch.tensor([self.rows[0].prompt]))
        if any(row.limit for row in self.rows):  # limits are either all 0 or all positive
            yield from self._decode_groups()
        else:
            for row in self.rows:
                row.reason = "length"
                yield row, ""
        if self.streamer is not None:
            self.streamer.end()

    def _decode_groups(self) -> Iterator[tuple[Row, str]]:
        core, options = self.core, self._options
        groups: Iterable[list[int]] = [list(range(len(self.rows)))]
        if not (options.logits_processor or options.stopping_criteria):  # these see all rows in each step
            groups = admitted(core, self.rows, sampling=options.do_sample)
        for group in groups:
            try:
                yield from self._decode([self.rows[i] for i in group], self._chooser(group))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise ContextTooLongError(
                    f"memory ran out while {len(group)} rows were decoded together; set icae.decode_budget below "
                    f"{core.decode_budget} bytes or ask for fewer tokens"
                ) from error

    def _chooser(self, group: list[int]) -> TokenChooser:
        rows, core = self.rows, self.core
        return TokenChooser(
            self._options, [rows[i].prompt for i in group], max(r.limit for r in rows), self._least, self.eos,
            core.vocabulary.pad, core.device, None if self._seeds is None else [self._seeds[i] for i in group],
        )  # fmt: skip

    def _decode(self, active: list[Row], chooser: TokenChooser) -> Iterator[tuple[Row, str]]:
        core = self.core
        session = _session(core, active)
        logits = session.start()
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(core.describe_non_finite("the logits"))
        n_choices, chosen = logits.shape[-1], chooser.choose(logits)[None]
        while True:
            for ids in chosen.tolist():  # the only host synchronisation of a step
                if max(ids) >= n_choices:
                    raise NonFiniteError("processors left a row's scores with NaN or with nothing to choose from")
                if self.streamer is not None:
                    self.streamer.put(torch.tensor(ids))
                for row, token, stopped in zip(active, ids, chooser.stopped(), strict=True):
                    yield row, row.push(token, token in self.eos, stopped)
            going = [i for i, row in enumerate(active) if row.reason is None]
            if not going:
                return
            tokens = chosen[-1]
            if len(going) < len(active):
                active = [active[i] for i in going]
                session.keep(going)
                chooser.keep(going)
                tokens = tokens[torch.tensor(going, device=tokens.device)]
            chosen = self._next(session, chooser, active, tokens)

    def _next(
        self, session: DecodeSession, chooser: TokenChooser, active: list[Row], tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return (n, rows) tokens of the next steps; n > 1 where only `eos` ids can end a row."""
        if not (session.runs_ahead and chooser.takes_the_largest):
            return chooser.choose(session.step(tokens))[None]
        ahead = 1 if self._stop_strings else max(1, min(STEPS_AHEAD, int(self._seconds / self._seconds_a_step)))
        start = time.perf_counter()
        chosen = session.greedy(
            tokens, min(ahead, *(r.limit - len(r.ids) for r in active)), self.eos, chooser.steps_before_eos
        )
        self._seconds_a_step = (time.perf_counter() - start) / len(chosen)
        chooser.skip(len(chosen))
        return chosen


@in_own_modes
def _session(core: ICAECore, rows: Sequence[Row]) -> DecodeSession:
    """Start a session behind the slot KV of each row's memory, computing what is not cached."""
    pieces: dict[tuple[int, tuple[int, ...]], list[torch.Tensor]] = {}
    keys = [(id(row.memory), tuple(row.prefix)) for row in rows]
    for key, row in zip(keys, rows, strict=True):
        if key not in pieces:
            pieces[key] = memory_pieces(core, row.memory, row.prefix)
    paths = dict(zip(pieces, core.slot_kv.paths(list(pieces.values())), strict=True))
    suffixes = [core.tokens_to_embeddings(torch.tensor(row.suffix, dtype=torch.int64)) for row in rows]
    return DecodeSession(core, [paths[key] for key in keys], suffixes, max(row.limit for row in rows))
