"""Restoration (autoencoding) of passages from their slots, by length of the passage and by number of slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icae_fast.training.evaluation.measures import bleu_signature, corpus_bleu, exact_prefix, quartiles, sentence_bleu
from icae_fast.training.evaluation.result import Plot, Result
from icae_fast.training.evaluation.subject import MEMORY_SIZES, Subject
from icae_fast.training.evaluation.texts.passages import Excerpt
from icae_fast.training.evaluation.texts.published import ICAE_BY_LENGTH
from icae_fast.training.evaluation.texts.scoring import Scores, restoration_scores, restored_ids
from icae_fast.training.evaluation.workbench import Cases, Workbench

PAPER_LENGTHS = (100, 200, 300, 400, 500)
SPANS = (0.25, 0.5, 1, 2, 4)  # passage lengths in units of an adapter's full span

RESTORATION_COLUMNS = {
    "tokens": "length of the passages, tokens",
    "slots": "slots that a passage is compressed into",
    "passages": "passages measured",
    "bleu": "BLEU-4 of all passages as one corpus, 0 to 1",
    "bleu_median": "median of the passages' own BLEU",
    "bleu_low": "its first quartile",
    "bleu_high": "its third quartile",
    "prefix_median": "median share of a passage before its first wrong token",
    "prefix_low": "its first quartile",
    "prefix_high": "its third quartile",
    "identical": "share of passages restored token for token, end included",
    "accuracy": "share of tokens predicted correctly under teacher forcing",
    "loss": "cross-entropy under teacher forcing, nats per token",
}
_COLUMNS = {"subject": "adapter and base model"} | RESTORATION_COLUMNS
_HEADLINE = ("subject", "tokens", "slots", "bleu", "bleu_median", "prefix_median", "accuracy")
_DECODING = "greedy, free-running, at most 16 tokens beyond the passage"


def restoration_row(
    subject: Subject, excerpts: Sequence[Excerpt], bench: Workbench
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the restoration of passages of one length.

    Args:
        subject: the adapter.
        excerpts: at least one passage.
        bench: caches restored passages and scores.

    Returns:
        `subject` and the cells of `RESTORATION_COLUMNS`, and a record of each passage.

    Raises:
        ContextTooLongError: a passage and its slots do not fit into the model's positions.
    """
    rows = [excerpt.ids for excerpt in excerpts]
    scores, restored = restoration_scores(subject, rows, bench), restored_ids(subject, rows, bench)
    decode = subject.icae.tokenizer.decode
    samples = []
    for excerpt, ids, score in zip(excerpts, restored, scores, strict=True):
        original, text = (decode(row, skip_special_tokens=True) for row in (excerpt.ids, ids))
        samples.append({
            "subject": subject.name, "tokens": len(excerpt.ids), "slots": subject.n_slots(len(excerpt.ids)),
            "origin": excerpt.origin, "bleu": sentence_bleu(text, original),
            "prefix": exact_prefix(excerpt.ids, ids), "identical": excerpt.ids == ids, "accuracy": score.accuracy,
            "loss": score.mean_loss, "original": original, "restored": text,
        })  # fmt: skip
    total = Scores.total(scores)
    row = {name: samples[0][name] for name in ("subject", "tokens", "slots")}
    row["passages"] = len(samples)
    row["bleu"] = corpus_bleu([s["restored"] for s in samples], [s["original"] for s in samples])
    for name in ("bleu", "prefix"):
        values = quartiles([s[name] for s in samples])
        row |= dict(zip((f"{name}_low", f"{name}_median", f"{name}_high"), values, strict=True))
    row["identical"] = sum(s["identical"] for s in samples) / len(samples)
    return row | {"accuracy": total.accuracy, "loss": total.mean_loss}, samples


def restoration_by_length(
    subjects: Sequence[Subject], bench: Workbench, lengths: Sequence[int] | None = None
) -> Result:
    """Measure restoration by passage length, at each adapter's own k.

    Args:
        subjects: adapters to measure side by side.
        bench: draws passages; those of all lengths begin at the same places.
        lengths: passage lengths in tokens, by default those of the paper and `SPANS` of each adapter.

    Raises:
        DataError: no length can be measured.
    """
    cases = [(s, s.name, n) for s in subjects for n in lengths or sorted({*PAPER_LENGTHS, *_lengths(s)})]
    result = _measure(cases, bench)
    result.name, result.title = "restoration_by_length", "Restoration by length"
    result.plots = [
        Plot("line", "tokens", y, "subject", low, high, x_label="passage, tokens", y_label=label, y_max=1)
        for y, low, high, label in (
            ("bleu_median", "bleu_low", "bleu_high", "BLEU, median and quartiles"),
            ("prefix_median", "prefix_low", "prefix_high", "exact prefix, median and quartiles"),
            ("accuracy", None, None, "token accuracy, teacher-forced"),
        )
    ]
    published = ", ".join(f"{bleu} at {n}" for n, bleu in ICAE_BY_LENGTH.figures.items())
    result.notes = [
        f"For comparison, BLEU-4 of {ICAE_BY_LENGTH.what}: {published} tokens ({ICAE_BY_LENGTH.source}).",
        "Rows with passages longer than a full span have fewer passages, so that all rows take about the same time.",
    ]
    return result


def restoration_by_memory_size(
    subjects: Sequence[Subject],
    bench: Workbench,
    memory_sizes: Sequence[int] = MEMORY_SIZES,
    lengths: Sequence[int] | None = None,
) -> Result:
    """Measure restoration by k: the first k' memory tokens of an adapter, on passages of at most one span.

    Args:
        subjects: adapters to measure side by side.
        bench: draws passages.
        memory_sizes: values of k; unsupported ones are left out, and an adapter's own k is always included.
        lengths: passage lengths in tokens, by default a quarter, a half and a whole span; longer ones are left out.

    Raises:
        DataError: nothing can be measured.
    """
    cases = []
    for subject in subjects:
        own = [n for n in lengths or _lengths(subject) if n <= subject.span_tokens]
        smaller = [subject.with_memory_size(k) for k in subject.memory_sizes(memory_sizes)]
        cases += [(s, f"{s.name}, {n} tokens", n) for s in smaller for n in own]
    result = _measure(cases, bench)
    result.name, result.title = "restoration_by_memory_size", "Restoration by k"
    result.plots = [
        Plot("line", "slots", y, "case", low, high, x_log=True, x_label="k, slots", y_label=label, y_max=1)
        for y, low, high, label in (
            ("bleu_median", "bleu_low", "bleu_high", "BLEU, median and quartiles"),
            ("prefix_median", "prefix_low", "prefix_high", "exact prefix, median and quartiles"),
        )
    ]
    result.notes = ["An adapter that was trained with a single k is not expected to work with others."]
    return result


def _lengths(subject: Subject) -> list[int]:
    """Return `SPANS` in tokens."""
    return sorted({max(1, int(spans * subject.span_tokens)) for spans in SPANS})


def _measure(cases: Sequence[tuple[Subject, str, int]], bench: Workbench) -> Result:
    """Return a result with a row for each (subject, series name in plots, length)."""
    found, subjects = Cases(), [subject for subject, _, _ in cases]
    for subject, case, n in cases:
        with found.case(f"{case}, {n} tokens" if case == subject.name else case):
            row, samples = restoration_row(subject, bench.draw(subject, n, count=bench.affordable(subjects, n)), bench)
            found.add(row | {"case": case}, samples)
    found.check()
    facts = {"decoding": _DECODING, "bleu": bleu_signature(), "skipped": found.skipped}
    return Result("", "", _COLUMNS, found.rows, facts, samples=found.samples, headline=_HEADLINE)
