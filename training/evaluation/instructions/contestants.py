"""Contestants, which answer prompts about a text: a model that reads its slots, or the base model on text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from icae_fast import ICAE
from icae_fast.core.text import clean_text
from icae_fast.core.tokens import encode_text
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
    """A subject, or its base model, with what it reads for a text.

    Args:
        subject: its adapter makes the slots, or its base model reads the text.
        reads: "slots"; "full", the whole text; "truncated", the text's first tokens, as many as the subject has slots
            for it; "summary", a summary of at most that many tokens, which the base model writes from the full text.
    """

    subject: Subject
    reads: Reads

    @property
    def name(self) -> str:
        """The name shown in tables."""
        return f"{self.subject.name}: {LABELS[self.reads]}"

    @property
    def identity(self) -> str:
        """A key that is equal for contestants that would return the same answers."""
        config = self.subject.icae.config
        if self.reads == "slots":
            return self.subject.key([], self.reads)
        sizes = [] if self.reads == "full" else [config.memory_size, config.max_span_tokens]
        return self.subject.base_key(self.reads, config.prompt_format == "chat", sizes)


def contestants_of(subjects: Sequence[Subject], reads: Sequence[Reads] = get_args(Reads)) -> list[Contestant]:
    """Return a contestant for every subject and kind of input, without those that would repeat another's answers.

    Args:
        subjects: the adapters.
        reads: kinds of input.

    Raises:
        InvalidInputError: see `known_reads`.
    """
    found: dict[str, Contestant] = {}
    for subject in subjects:
        for name in known_reads(reads):
            contestant = Contestant(subject, name)
            found.setdefault(contestant.identity, contestant)
    return list(found.values())


def known_reads(reads: Sequence[str]) -> tuple[Reads, ...]:
    """Return kinds of input by their names, without repetitions.

    Raises:
        InvalidInputError: a name is unknown, or there is none.
    """
    unknown = [name for name in reads if name not in LABELS]
    if unknown or not reads:
        what = ", ".join(unknown) or "nothing"
        raise InvalidInputError(f"{what} cannot be read by contestants; choose among {', '.join(LABELS)}")
    return tuple(kind for name in dict.fromkeys(reads) for kind in LABELS if kind == name)


@dataclass(frozen=True)
class TextLayout:
    """The base model's input: `before, text, blank line, prompt, after`.

    Args:
        prefix: ids of `before` and the text, shared by all prompts about the text.
        suffix: the remaining ids.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prefix) + len(self.suffix)


def text_ids(icae: ICAE, text: str) -> list[int]:
    """Tokenise a text for the base model, with special tokens unless the chat template adds them."""
    has_template = bool(_template(icae)[0])
    return encoded(icae, text, "the text", add_special_tokens=not has_template)


def lay_out(icae: ICAE, text: Sequence[int], prompt: str) -> TextLayout:
    """Lay out a prompt about a text in the template that slots are read in, without the special tokens AE, LM and FT.

    Args:
        icae: its base model reads the layout.
        text: ids of the text.
        prompt: the prompt after the text.
    """
    before, after = _template(icae)
    asked = encoded(icae, "\n\n" + prompt, "the prompt", add_special_tokens=False)
    return TextLayout((*before, *text), (*asked, *after))


def encoded(icae: ICAE, text: str, what: str, *, add_special_tokens: bool) -> list[int]:
    """Tokenise a text as the ICAE does, without its limits."""
    return encode_text(
        icae.tokenizer, clean_text(text, what), what, add_special_tokens=add_special_tokens,
        special_tokens=icae.special_tokens,
    )  # fmt: skip


def _template(icae: ICAE) -> tuple[list[int], list[int]]:
    if icae.config.prompt_format != "chat":
        return [], []
    return chat_template_ids(icae.tokenizer, icae.chat_template_kwargs)


def answers_to_text(icae: ICAE, layouts: Sequence[TextLayout], limits: Sequence[int]) -> list[Answer]:
    """Return the base model's greedy answers, decoded in one batch that reads each text once for all its prompts.

    Args:
        icae: its base model answers.
        layouts: the inputs.
        limits: maximum new tokens of each answer.

    Raises:
        ContextTooLongError: a row needs more positions than the base model has.
    """
    rows = rows_behind_text(icae, [(layout.prefix, layout.suffix) for layout in layouts], limits)
    return AnswerBatch(icae, rows, 0, GenerationOptions()).finish()
