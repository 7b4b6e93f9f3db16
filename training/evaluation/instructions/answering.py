"""Let all contestants answer the same prompts greedily, in batches, through the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from icae_fast.errors import DataError
from icae_fast.generation.answers import Answer
from icae_fast.training.evaluation.instructions.contestants import (
    Contestant,
    TextLayout,
    answers_to_text,
    encoded,
    lay_out,
    text_ids,
)
from icae_fast.training.evaluation.instructions.questions import Question
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.workbench import Workbench

SUMMARY_PROMPT = "Summarize the text above in a few sentences. Keep names, numbers and key facts."


@dataclass(frozen=True)
class GivenAnswer:
    """An answer of a contestant.

    Args:
        text: the answer without special tokens.
        n_tokens: its tokens, the end-of-sequence token included.
        ended: whether it ended within the limit.
        n_read: slots, or tokens of text, that the contestant read for the input.
    """

    text: str
    n_tokens: int
    ended: bool
    n_read: int


@dataclass
class Answered:
    """Questions with the answers of all contestants.

    Args:
        questions: the questions that fit every contestant.
        answers: answers of each contestant, one per question.
        max_new_tokens: limit of an answer.
        left_out: number of questions that were not asked, by cause.
        cut_summaries: (summaries that did not end within their budget, all summaries) by contestant.
    """

    questions: list[Question]
    answers: dict[Contestant, list[GivenAnswer]]
    max_new_tokens: int
    left_out: Counter[str] = field(default_factory=Counter)
    cut_summaries: dict[str, tuple[int, int]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the protocol as JSON values."""
        return {
            "questions": len(self.questions),
            "max_new_tokens": self.max_new_tokens,
            "decoding": "greedy",
            "left_out": dict(self.left_out),
            "summary_prompt": SUMMARY_PROMPT,
            "cut_summaries": {name: {"cut": cut, "of": n} for name, (cut, n) in self.cut_summaries.items()},
            "subjects": [s.describe() for s in {id(c.subject): c.subject for c in self.answers}.values()],
        }


def answer_all(
    contestants: Sequence[Contestant], questions: Sequence[Question], bench: Workbench, max_new_tokens: int = 128
) -> Answered:
    """Let every contestant answer every question greedily.

    A question that does not fit into the positions of one contestant's base model is counted and asked of none, so that
    all figures are over the same questions.

    Args:
        contestants: see `contestants_of`.
        questions: see `read_questions`.
        bench: caches answers and summaries.
        max_new_tokens: limit of an answer.

    Raises:
        DataError: no question fits.
    """
    left_out: Counter[str] = Counter()
    asked = []
    for question in questions:
        causes = (_why_not(c, question, max_new_tokens) for c in contestants)
        if cause := next(filter(None, causes), None):
            left_out[cause] += 1
        else:
            asked.append(question)
    if not asked:
        reasons = ", ".join(f"{n} times {cause}" for cause, n in left_out.most_common()) or "there is none"
        raise DataError(f"no question can be asked: {reasons}; give shorter texts, or leave that contestant out")
    answered = Answered(asked, {}, max_new_tokens, left_out)
    for contestant in contestants:
        answer = _from_slots if contestant.reads == "slots" else _from_text
        answered.answers[contestant] = answer(contestant, answered, bench)
    return answered


def _why_not(contestant: Contestant, question: Question, max_new_tokens: int) -> str | None:
    """Return why a question cannot be asked, None if it can."""
    icae = contestant.subject.icae
    n_text, budget = _sizes(contestant, question)
    after = len(lay_out(icae, [], question.prompt)) + max_new_tokens
    needed = {
        "slots": budget + 1 + after,
        "full": n_text + after,
        "truncated": min(n_text, budget) + after,
        "summary": max(n_text + len(lay_out(icae, [], SUMMARY_PROMPT)) + budget, budget + after),
    }[contestant.reads]
    return f"too long for {contestant.name}" if needed > icae.max_positions else None


def _sizes(contestant: Contestant, question: Question) -> tuple[int, int]:
    """Return the base model's tokens of a question's text, and the subject's slots for it."""
    icae = contestant.subject.icae
    n_compressed = len(encoded(icae, question.input, "the text", add_special_tokens=True))
    return len(text_ids(icae, question.input)), contestant.subject.n_slots(n_compressed)


def _from_slots(contestant: Contestant, answered: Answered, bench: Workbench) -> list[GivenAnswer]:
    subject, limit = contestant.subject, answered.max_new_tokens
    icae = subject.icae
    contexts = [icae.context_ids(q.input).tolist() for q in answered.questions]
    pairs = [(context, q.prompt) for context, q in zip(contexts, answered.questions, strict=True)]

    def run(batch: Sequence[tuple[list[int], str]]) -> list[Any]:
        distinct = {tuple(context): None for context, _ in batch}
        memories = dict(zip(distinct, icae.compress([list(c) for c in distinct]), strict=True))
        found = icae.answer([memories[tuple(c)] for c, _ in batch], [p for _, p in batch], max_new_tokens=limit)
        return [_to_json(a) for a in found]

    keys = [subject.key(context, "answer", icae.prompt_ids(prompt), limit) for context, prompt in pairs]
    costs = [subject.n_slots(len(context)) + limit for context in contexts]
    values = bench.compute(f"{contestant.name}: answering", pairs, keys, costs, run)
    return [_given(v, subject.n_slots(len(c))) for v, c in zip(values, contexts, strict=True)]


def _from_text(contestant: Contestant, answered: Answered, bench: Workbench) -> list[GivenAnswer]:
    subject = contestant.subject
    texts = _texts(contestant, answered, bench)
    layouts = [lay_out(subject.icae, texts[q.input], q.prompt) for q in answered.questions]
    limits = [answered.max_new_tokens] * len(layouts)
    values = _written(subject, f"{contestant.name}: answering", layouts, limits, bench)
    return [_given(v, len(texts[q.input])) for v, q in zip(values, answered.questions, strict=True)]


def _texts(contestant: Contestant, answered: Answered, bench: Workbench) -> dict[str, list[int]]:
    """Return the ids that a contestant reads for each input."""
    icae = contestant.subject.icae
    inputs = {q.input: q for q in answered.questions}
    full = {text: text_ids(icae, text) for text in inputs}
    if contestant.reads == "full":
        return full
    budgets = {text: _sizes(contestant, q)[1] for text, q in inputs.items()}
    if contestant.reads == "truncated":
        return {text: ids[: budgets[text]] for text, ids in full.items()}
    layouts = [lay_out(icae, ids, SUMMARY_PROMPT) for ids in full.values()]
    what = f"{contestant.name}: summarising"
    values = _written(contestant.subject, what, layouts, [budgets[text] for text in full], bench)
    ended = [_ended(v) for v in values]
    answered.cut_summaries[contestant.name] = (ended.count(False), len(ended))
    return {
        text: v["ids"][:-1] if v["finish_reason"] == "eos" else v["ids"] for text, v in zip(full, values, strict=True)
    }


def _written(
    subject: Subject, what: str, layouts: Sequence[TextLayout], limits: Sequence[int], bench: Workbench
) -> list[Any]:
    """Return the base model's answer to each layout, in the form of `_to_json`."""
    items = list(zip(layouts, limits, strict=True))

    def run(batch: Sequence[tuple[TextLayout, int]]) -> list[Any]:
        return [_to_json(a) for a in answers_to_text(subject.icae, *zip(*batch, strict=True))]

    keys = [subject.base_key("answer to text", asdict(layout), limit) for layout, limit in items]
    return bench.compute(what, items, keys, [len(layout) + limit for layout, limit in items], run)


def _to_json(answer: Answer) -> dict[str, Any]:
    return asdict(answer)


def _ended(value: dict[str, Any]) -> bool:
    return value["finish_reason"] != "length"


def _given(value: dict[str, Any], n_read: int) -> GivenAnswer:
    return GivenAnswer(value["text"].strip(), len(value["ids"]), _ended(value), n_read)
