"""Drawing of training samples from tokenised rows: excerpts of documents, or instructions about a context.

The samples of a row depend on the row, the stage and a random generator that the caller seeds for the row. A drawn
sample is a `Draft`: its cost is known, and its ids are assembled only when its micro-batch is due, so that the samples
of many steps can be sorted without holding their tokens.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import numpy as np

from icae_fast.core.core import ICAECore
from icae_fast.core.spans import count_spans
from icae_fast.errors import ConfigError
from icae_fast.generation import prompts
from icae_fast.training.data.records import PWC, TEXT
from icae_fast.training.data.rows import Row
from icae_fast.training.data.tally import Tally
from icae_fast.training.methods.curriculum import Stage
from icae_fast.training.methods.objectives import (
    MIN_TOKENS_FOR_LM,
    Sample,
    autoencoding_sample,
    continuation_sample,
    draw_excerpt,
    instruction_sample,
)

log = logging.getLogger(__name__)

TRUNCATED = "truncated"
SKIPPED = "skipped"


class SampleLayout:
    """The properties of an ICAE that determine samples, without its weights.

    It implements `icae_fast.training.methods.objectives.Layout`, can be sent to another process, and renders the chat
    template only once.

    Args:
        icae: the model to train.
    """

    def __init__(self, icae: ICAECore) -> None:
        self.config = icae.config
        self.vocabulary = icae.vocabulary
        self.eos_token_ids = icae.eos_token_ids
        self.end_id = prompts.end_id(icae)
        self.leading_ids = icae.leading_ids
        self.max_positions = icae.max_positions
        if not self.eos_token_ids:
            raise ConfigError(
                "neither the base model nor its tokenizer has an EOS token, and training samples need one"
            )
        self._before, (self._ft, *self._behind) = prompts.layout_ids(
            [], icae.tokenizer, self.vocabulary, self.config.prompt_format, self.leading_ids, icae.chat_template_kwargs
        )

    def prompt_ids(self, prompt: Iterable[int]) -> tuple[list[int], list[int]]:
        """Return the ids before and after the slots, as `ICAE.prompt_ids` does."""
        return self._before, [self._ft, *prompt, *self._behind]

    def n_slots(self, n_tokens: int) -> int:
        """Return the number of slots of a context of `n_tokens` tokens."""
        return count_spans(n_tokens, self.config) * self.config.memory_size

    def n_before(self, n_tokens: int) -> int:
        """Return the decoder tokens before AE or a continuation: `leading_ids`, and the slots of `n_tokens` tokens."""
        return len(self.leading_ids) + self.n_slots(n_tokens)


@dataclass(frozen=True)
class Draft:
    """A chosen sample whose ids are not assembled yet.

    Args:
        cost: `Sample.n_tokens` of the sample.
        build: returns the sample.
    """

    cost: int
    build: Callable[[], Sample]


class Draw(Protocol):
    """An object that draws the samples of a row.

    Attributes:
        fields: text fields of the rows.
        layout: layout of the samples.
    """

    fields: tuple[str, ...]
    layout: SampleLayout

    def check(self, stage: Stage) -> None:
        """Raise unless the samples of a stage can be drawn.

        Raises:
            ConfigError: the stage has an objective that the rows do not support, or its samples cannot fit into the
                base model's positions.
        """

    def __call__(self, row: Row, stage: Stage, rng: random.Random, tally: Tally) -> list[Draft]:
        """Return the samples of a row, possibly none; `tally` counts skipped and truncated rows."""


class PretrainingDraw:
    """Excerpts of documents, each to be restored or continued.

    A document of n tokens has one excerpt, or with `excerpts="all"` as many as their lengths need to add up to n.
    Excerpt i of m begins in the i-th of m equal parts of the document. The target of a continuation has at most the
    length of its excerpt (and `max_target_tokens`, and the base model's positions). If 64 or fewer tokens would be
    continued, the excerpt is restored instead, as in the reference, or in a stage without "ae" skipped and counted.

    Args:
        icae: the model to train.
        excerpts: "all" or "one" per epoch, of a document or of each part of it (see
            `icae_fast.training.data.sources.open_source`).
        spans: (low, high), the range from which the number of full spans of an excerpt is drawn, up to the stage's
            `max_tokens`. Default None: lengths depend only on the stage.
        max_target_tokens: tokens of a continuation, at most. Default None: the length of the excerpt.
        lm_token: put the LM token after the slots of a continuation.

    Raises:
        ConfigError: an option is out of range.
    """

    fields: tuple[str, ...] = TEXT

    def __init__(
        self,
        icae: ICAECore,
        *,
        excerpts: Literal["all", "one"] = "all",
        spans: tuple[int, int] | None = None,
        max_target_tokens: int | None = None,
        lm_token: bool = False,
    ) -> None:
        if excerpts not in ("all", "one"):
            raise ConfigError(f"excerpts is {excerpts!r}; it must be 'all' or 'one'")
        if spans is not None and not 1 <= spans[0] <= spans[1]:
            raise ConfigError(f"spans is {list(spans)}; give [low, high] with 1 <= low <= high")
        if max_target_tokens is not None and max_target_tokens <= MIN_TOKENS_FOR_LM:
            raise ConfigError(f"max_target_tokens is {max_target_tokens}; it must be over {MIN_TOKENS_FOR_LM}, or None")
        self.layout = SampleLayout(icae)
        self.excerpts = excerpts
        self.spans = spans
        self.max_target_tokens = max_target_tokens
        self.lm_token = lm_token

    def check(self, stage: Stage) -> None:
        """See `Draw.check`."""
        if "ft" in stage.objectives:
            raise ConfigError("a stage has 'ft', but rows of text have no prompts; give rows of instructions")
        longest = stage.max_tokens
        if self.spans is not None:
            longest = min(longest, self.spans[1] * self.layout.config.max_span_tokens)
        if "lm" in stage.objectives and longest <= MIN_TOKENS_FOR_LM:
            self._report_short(stage, longest)
        restores = stage.is_code or "ae" in stage.objectives
        target = 1 if stage.is_warm else longest + 1 if restores else MIN_TOKENS_FOR_LM + 1
        needed = self.layout.n_before(longest) + 1 + target
        if not stage.is_warm and needed > self.layout.max_positions:
            what = "restored" if restores else f"continued by {MIN_TOKENS_FOR_LM + 1}"
            raise ConfigError(
                f"a context of {longest} tokens, {what}, needs {needed} positions of the decoder, and there are "
                f"{self.layout.max_positions}; lower the stage's max_tokens, leave out 'ae', or allow more positions"
            )

    def _report_short(self, stage: Stage, longest: int) -> None:
        """Raise, or with "ae" warn, that no excerpt of a stage can be continued."""
        text = (
            f"a continuation has at most the tokens of its excerpt, and needs more than {MIN_TOKENS_FOR_LM}, but the "
            f"excerpts have at most {longest}"
        )
        if "ae" not in stage.objectives:
            raise ConfigError(f"{text}; raise the stage's max_tokens (and data.spans), or train 'ae' in place of 'lm'")
        log.warning("%s; all are restored until max_tokens (and data.spans) are raised", text)

    def __call__(self, row: Row, stage: Stage, rng: random.Random, tally: Tally) -> list[Draft]:
        """See `Draw.__call__`."""
        lengths = [self._draw_length(stage, rng)]
        while self.excerpts == "all" and sum(lengths) < row.end - row.start:
            lengths.append(self._draw_length(stage, rng))
        drafts = [self._draft(row, stage, rng, tally, i, lengths) for i in range(len(lengths))]
        return [draft for draft in drafts if draft is not None]

    def _draw_length(self, stage: Stage, rng: random.Random) -> int:
        if self.spans is None:
            return stage.draw_length(rng)
        return min(rng.randint(*self.spans) * self.layout.config.max_span_tokens, stage.max_tokens)

    def _draft(
        self, row: Row, stage: Stage, rng: random.Random, tally: Tally, i: int, lengths: list[int]
    ) -> Draft | None:
        """Return excerpt i of a row, or None if it can be neither continued nor restored."""
        layout, (ids,) = self.layout, row.ids
        objective = stage.draw_objective(rng)
        wants_lm = objective == "lm"
        part = (row.end - row.start) / len(lengths)
        begins = row.start + int(i * part), row.start + max(int((i + 1) * part), int(i * part) + 1)
        start, end = draw_excerpt(rng, len(ids), lengths[i], begins, wants_lm)
        n_before = layout.n_before(end - start)
        if wants_lm:
            target = min(lengths[i], self.max_target_tokens or lengths[i], len(ids) - end)
            target = min(target, layout.max_positions - n_before - self.lm_token)
            if target > MIN_TOKENS_FOR_LM:
                build = partial(_continued, layout, row.origin, ids[start : end + target], end - start, self.lm_token)
                return Draft(end - start + n_before + self.lm_token + target, build)
            if "ae" not in stage.objectives:
                tally.add(
                    f"{SKIPPED}: too few tokens to continue an excerpt", row.origin,
                    f"{end - start} tokens, continued by {target}, and more than {MIN_TOKENS_FOR_LM} are needed",
                )  # fmt: skip
                return None
        needed = n_before + 1 + end - start + 1
        if objective != "warm" and needed > layout.max_positions:
            tally.add(
                f"{SKIPPED}: too little text after an excerpt that is too long to be restored", row.origin,
                f"{end - start} tokens need {needed} positions",
            )  # fmt: skip
            return None
        return Draft(end - start + needed, partial(_restored, layout, row.origin, ids[start:end]))


def _restored(layout: SampleLayout, origin: str, ids: np.ndarray) -> Sample:
    return replace(autoencoding_sample(layout, ids.tolist()), origin=origin)


def _continued(layout: SampleLayout, origin: str, ids: np.ndarray, n_context: int, lm_token: bool) -> Sample:
    sample = continuation_sample(layout, ids[:n_context].tolist(), ids[n_context:].tolist(), lm_token=lm_token)
    return replace(sample, origin=origin)


class InstructionDraw:
    """Prompts about a context, and their answers.

    Args:
        icae: the model to train; its tokenizer provides the chat template.
        max_context_tokens: tokens of a context, at most; the stage's `max_tokens` is a limit too.
        max_answer_tokens: tokens of a prompt, and of an answer, at most.
        on_long_row: "truncate" cuts longer fields (a truncated answer has no EOS), "skip" drops the row; both are
            counted. A row whose slots, prompt and answer exceed the base model's positions even so is always dropped.

    Raises:
        ConfigError: an option is out of range.
    """

    fields: tuple[str, ...] = PWC

    def __init__(
        self,
        icae: ICAECore,
        *,
        max_context_tokens: int = 2048,
        max_answer_tokens: int = 512,
        on_long_row: Literal["truncate", "skip"] = "truncate",
    ) -> None:
        if on_long_row not in ("truncate", "skip"):
            raise ConfigError(f"on_long_row is {on_long_row!r}; it must be 'truncate' or 'skip'")
        for name, value in (("max_context_tokens", max_context_tokens), ("max_answer_tokens", max_answer_tokens)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        self.layout = SampleLayout(icae)
        self.max_context_tokens = max_context_tokens
        self.max_answer_tokens = max_answer_tokens
        self.on_long_row = on_long_row

    def check(self, stage: Stage) -> None:
        """See `Draw.check`."""
        if others := sorted(set(stage.objectives) - {"ft", "warm"}):
            raise ConfigError(f"a stage has {', '.join(others)}, but rows of instructions support 'ft' and 'warm'")
        slots = self.layout.n_slots(min(self.max_context_tokens, stage.max_tokens))
        if slots >= self.layout.max_positions:
            raise ConfigError(
                f"the longest context has {slots} slots, which fill all of the decoder's {self.layout.max_positions} "
                "positions; lower max_context_tokens, or allow more positions"
            )

    def __call__(self, row: Row, stage: Stage, rng: random.Random, tally: Tally) -> list[Draft]:
        """See `Draw.__call__`."""
        layout = self.layout
        limits = min(self.max_context_tokens, stage.max_tokens), self.max_answer_tokens, self.max_answer_tokens
        parts = zip(("context", "prompt", "answer"), row.ids, limits, strict=True)
        long = [(name, len(ids), limit) for name, ids, limit in parts if len(ids) > limit]
        if long and self.on_long_row == "skip":
            name, n, limit = long[0]
            tally.add(f"{SKIPPED}: {name} too long", row.origin, f"{n} tokens, and {limit} are allowed")
            return []
        context, prompt, answer = (ids[:limit] for ids, limit in zip(row.ids, limits, strict=True))
        ends = len(answer) == len(row.ids[2])
        before, behind = layout.prompt_ids(prompt)
        needed = len(before) + layout.n_slots(len(context)) + len(behind) + len(answer) + ends
        if needed > layout.max_positions:
            tally.add(
                f"{SKIPPED}: more than the base model's positions", row.origin,
                f"{needed} are needed, and there are {layout.max_positions}",
            )  # fmt: skip
            return []
        for name, n, limit in long:
            tally.add(f"{TRUNCATED}: {name} too long", row.origin, f"the first {limit} of {n} tokens are kept")
        build = partial(_instructed, layout, row.origin, (context, prompt, answer), ends)
        return [Draft(len(context) + needed, build)]


def _instructed(layout: SampleLayout, origin: str, ids: Sequence[np.ndarray], ends: bool) -> Sample:
    sample = instruction_sample(layout, *(part.tolist() for part in ids), ends=ends)
    return replace(sample, origin=origin)
