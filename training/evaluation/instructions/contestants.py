"""Who answers prompts about a text: a model that reads its slots, or the base model on text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from icae_fast import ICAE
from icae_fast.errors import InvalidInputError
from icae_fast.generation.answers import Answer, AnswerBatch
from icae_fast.generation.prompts import chat_template_ids
from icae_fast.generation.sampling import GenerationOptions
from icae_fast.training.chat.writing import rows_behind_text
from icae_fast.training.evaluation.subject import Subject

Reads = Literal["slots", "full", "truncated", "summary"]
LABELS: dict[Reads, str] = {
    "slots": "slots", "full": "full text", "truncated": "truncated text", "summary": "summary",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Contestant:
    """A subject, or its base model, and what it reads in place of a text.

    Args:
        subject: whose adapter makes slots, or whose base model reads text.
        reads: "slots"; "full", the whole text; "truncated", as many of its first tokens as the subject has slots for
            it; "summary", one of at most so many tokens, which the base model writes from the full text.
    """

    subject: Subject
    reads: Reads

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.subject.name}: {LABELS[self.reads]}"

    @property
    def identity(self) -> str:
        """The same for contestants that would give the same answers whatever their subjects' adapters."""
        config = self.subject.icae.config
        if self.reads == "slots":
            return self.subject.key([], self.reads)
        sizes = [] if self.reads == "full" else [config.memory_size, config.max_span_tokens]
        return self.subject.base_key(self.reads, config.prompt_format == "chat", sizes)


def contestants_of(subjects: Sequence[Subject], reads: Sequence[Reads] = get_args(Reads)) -> list[Contestant]:
    """Every subject on everything that is asked for; what several subjects would answer alike, only for the first.

    Raises:
        InvalidInputError: see `check_reads`.
    """
    check_reads(reads)
    found: dict[str, Contestant] = {}
    for subject in subjects:
        for name in dict.fromkeys(reads):
            contestant = Contestant(subject, name)
            found.setdefault(contestant.identity, contestant)
    return list(found.values())


def check_reads(reads: Sequence[str]) -> None:
    """That contestants can read these things.

    Raises:
        InvalidInputError: there is no such thing to read, or nothing.
    """
    unknown = [name for name in reads if name not in LABELS]
    if unknown or not reads:
        what = ", ".join(unknown) or "nothing"
        raise InvalidInputError(f"{what} cannot be read by contestants; choose among {', '.join(LABELS)}")


@dataclass(frozen=True)
class TextLayout:
    """What the base model reads: `before, text, blank line, prompt, after`.

    Args:
        prefix: ids of `before` and the text, which prompts about one text share.
        suffix: the other ids.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prefix) + len(self.suffix)


def text_ids(icae: ICAE, text: str) -> list[int]:
    """Ids of a text for the base model: with the tokenizer's special tokens where no template brings them."""
    has_template = bool(_template(icae)[0])
    return icae.tokenizer(text, add_special_tokens=not has_template, verbose=False)["input_ids"]


def lay_out(icae: ICAE, text: Sequence[int], prompt: str) -> TextLayout:
    """A prompt about a text in the template that the slots are read in, without AE, LM and FT, which belong to those.

    Args:
        icae: whose base model reads.
        text: ids.
        prompt: asked behind it.
    """
    before, after = _template(icae)
    asked = icae.tokenizer("\n\n" + prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return TextLayout((*before, *text), (*asked, *after))


def _template(icae: ICAE) -> tuple[list[int], list[int]]:
    return chat_template_ids(icae.tokenizer) if icae.config.prompt_format == "chat" else ([], [])


def answers_to_text(icae: ICAE, layouts: Sequence[TextLayout], limits: Sequence[int]) -> list[Answer]:
    """Greedy answers of the base model, all in one batch, which reads a text once for all prompts about it.

    Args:
        icae: whose base model reads.
        layouts: what it reads.
        limits: most new tokens of each.

    Raises:
        ContextTooLongError: a row passes the base model's positions.
    """
    rows = rows_behind_text(icae, [(layout.prefix, layout.suffix) for layout in layouts], limits)
    return AnswerBatch(icae, rows, 0, GenerationOptions()).finish()
