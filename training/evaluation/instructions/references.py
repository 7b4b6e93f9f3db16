"""Scores of all contestants' answers against the references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icae_fast.training.evaluation.instructions.answering import Answered, GivenAnswer
from icae_fast.training.evaluation.instructions.contestants import Contestant
from icae_fast.training.evaluation.instructions.overlap import (
    ROUGE_TYPES,
    exact_match,
    normalised_words,
    rouge,
    word_f1,
)
from icae_fast.training.evaluation.instructions.questions import Question
from icae_fast.training.evaluation.measures import quartiles
from icae_fast.training.evaluation.result import Plot, Result

SHORT_WORDS = 5  # a reference of at most this many words counts as a short answer
ALL_KINDS = "all"

COLUMNS = {
    "contestant": "who answers, and what it reads for the text",
    "kind": "kind of the prompt",
    "answers": "number of answers",
    "read": "slots or tokens read for the text, median",
    "rouge1": "ROUGE-1 F1, mean, 0 to 1",
    "rouge2": "ROUGE-2 F1, mean",
    "rougeL": "ROUGE-L F1, mean",
    "rougeL_q1": "ROUGE-L F1, first quartile",
    "rougeL_median": "ROUGE-L F1, median",
    "rougeL_q3": "ROUGE-L F1, third quartile",
    "short": f"answers whose reference is short, at most {SHORT_WORDS} words; the next two columns are of these",
    "exact_match": "share equal to the reference, ignoring case, articles and punctuation",
    "f1": "F1 of their words, mean",
    "tokens": "tokens of an answer, median",
    "cut": "share of answers that did not end within the limit",
}


def measure_instructions(answered: Answered) -> Result:
    """Compute ROUGE of all answers, and exact match and F1 of short ones, by contestant and kind of prompt.

    Args:
        answered: see `answer_all`.

    Raises:
        InvalidInputError: the package rouge-score is not installed.
    """
    questions = answered.questions
    scores = {
        contestant: [_scores(q, a) for q, a in zip(questions, given, strict=True)]
        for contestant, given in answered.answers.items()
    }
    kinds = sorted({q.kind or "other" for q in questions})
    rows = []
    for kind in (ALL_KINDS, *(kinds if len(kinds) > 1 else ())):
        chosen = [i for i, q in enumerate(questions) if kind in (ALL_KINDS, q.kind or "other")]
        for contestant, given in answered.answers.items():
            own = scores[contestant]
            rows.append(_row(contestant, kind, [given[i] for i in chosen], [own[i] for i in chosen]))
    plot = Plot(
        "bar", "kind", "rougeL_median", "contestant", "rougeL_q1", "rougeL_q3",
        x_label="kind of prompt", y_label="ROUGE-L F1 (median, quartiles)", y_max=1.0,
    )  # fmt: skip
    return Result(
        name="instructions",
        title="Instructions: answers against references",
        columns=COLUMNS,
        rows=rows,
        facts=answered.facts() | {"short_words": SHORT_WORDS, "rouge": "rouge_score, F1, with stemmer"},
        notes=_notes(answered),
        plots=[plot],
        samples=[_sample(answered, scores, i) for i in range(len(questions))],
        headline=("contestant", "kind", "answers", "read", "rouge1", "rougeL", "exact_match", "f1", "cut"),
    )


def _scores(question: Question, given: GivenAnswer) -> dict[str, float]:
    scores = rouge(given.text, question.answer)
    if len(normalised_words(question.answer)) <= SHORT_WORDS:
        pair = given.text, question.answer
        scores |= {"exact_match": exact_match(*pair), "f1": word_f1(*pair)}
    return scores


def _row(
    contestant: Contestant, kind: str, given: Sequence[GivenAnswer], scores: Sequence[dict[str, float]]
) -> dict[str, Any]:
    low, median, high = quartiles([s["rougeL"] for s in scores])
    short = [s for s in scores if "f1" in s]
    return {
        "contestant": contestant.name,
        "kind": kind,
        "answers": len(given),
        "read": quartiles([g.n_read for g in given])[1],
        **{name: _mean(s[name] for s in scores) for name in ROUGE_TYPES},
        "rougeL_q1": low,
        "rougeL_median": median,
        "rougeL_q3": high,
        "short": len(short),
        "exact_match": _mean(s["exact_match"] for s in short),
        "f1": _mean(s["f1"] for s in short),
        "tokens": quartiles([g.n_tokens for g in given])[1],
        "cut": _mean(not g.ended for g in given),
    }


def _mean(values: Any) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def _notes(answered: Answered) -> list[str]:
    notes = [
        "All answers are greedy, by the same base model in the same template; only what is read for the text differs. "
        "Truncated texts and summaries have at most as many tokens as the subject has slots for the text."
    ]
    notes += [f"{n} questions were left out: {cause}." for cause, n in answered.left_out.items()]
    for name, (cut, n) in answered.cut_summaries.items():
        if cut:
            notes.append(f"{name}: {cut} of {n} summaries did not end within their budget and were read truncated.")
    return notes


def _sample(answered: Answered, scores: dict[Contestant, list[dict[str, float]]], i: int) -> dict[str, Any]:
    question = answered.questions[i]
    return {
        "origin": question.origin, "kind": question.kind, "input": question.input, "prompt": question.prompt,
        "reference": question.answer,
        "answers": {c.name: {"text": given[i].text} | scores[c][i] for c, given in answered.answers.items()},
    }  # fmt: skip
