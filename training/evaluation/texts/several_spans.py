"""Several spans: their slots against the same number of raw tokens (the paper's 4,096 tokens in 1,024 slots)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icae_fast.training.evaluation.measures import bleu_signature, corpus_bleu
from icae_fast.training.evaluation.result import Plot, Result
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.texts.continuation import (
    CONTINUATION_COLUMNS,
    CONTINUATION_TOKENS,
    continuation_row,
)
from icae_fast.training.evaluation.texts.passages import Excerpt
from icae_fast.training.evaluation.texts.restoration import restoration_row
from icae_fast.training.evaluation.texts.scoring import Scores, restoration_scores, restored_ids
from icae_fast.training.evaluation.workbench import Cases, Workbench

SPANS = (1, 2, 4, 8)  # 8 spans of the paper's adapter are 4,096 tokens
WRITTEN_TOKENS = 2048  # longest context that is restored by decoding; more would take hours on a CPU

_WRITTEN = {
    "bleu": "BLEU-4 of the restored contexts as one corpus, 0 to 1",
    "prefix_median": "median share of a context before its first wrong token",
    "bleu_by_span": "BLEU-4 of the same contexts, with each span restored from its own slots",
}
_FORCED = {
    "accuracy": "token accuracy of restoring under teacher forcing",
    "loss": "cross-entropy of restoring under teacher forcing, nats per token",
}
_HEADLINE = ("subject", "spans", "slots", "ppl_text", "ppl_slots", "ppl_truncated", "bleu", "bleu_by_span")


def several_spans(subjects: Sequence[Subject], bench: Workbench, spans: Sequence[int] = SPANS) -> Result:
    """Measure continuation after the slots of n full spans and after as many raw tokens, and restoration of n spans.

    Args:
        subjects: adapters to measure side by side.
        bench: draws passages.
        spans: values of n; the facts list those that texts or positions do not allow.

    Raises:
        DataError: nothing can be measured.
    """
    found = Cases()
    for subject in subjects:
        for n in spans:
            case = f"{subject.name}, {n} spans"
            with found.case(case):
                context = n * subject.span_tokens
                excerpts = bench.draw(subject, context, CONTINUATION_TOKENS, bench.affordable([subject], context))
                row, samples = continuation_row(subject, excerpts, bench)
                row |= {"spans": n, **dict.fromkeys([*_FORCED, *_WRITTEN])}
                found.add(row, samples)
                with found.case(f"{case}, restored"):
                    _add_restoration(row, samples, subject, excerpts, bench)
    found.check()
    columns = {"subject": "adapter and base model", "spans": "full spans of the context"}
    return Result(
        "several_spans",
        "Several spans against as many raw tokens",
        columns | CONTINUATION_COLUMNS | _FORCED | _WRITTEN,
        found.rows,
        {"continuation_tokens": CONTINUATION_TOKENS, "bleu": bleu_signature(), "skipped": found.skipped},
        [
            "Compare ppl_slots with ppl_truncated: both have the same number of positions before the continuation.",
            "bleu is of contexts restored from all slots at once, bleu_by_span span by span (`ICAE.restore_by_span`).",
            "Rows of several spans have fewer contexts, so that all rows take about the same time. Contexts of more "
            f"than {WRITTEN_TOKENS:,} tokens are only scored, not restored.",
        ],
        [
            Plot(
                "line", "spans", "over_truncated", "subject", x_log=True, y_label="gain over raw tokens, nats per token"
            ),
            Plot("line", "spans", "bleu", "subject", x_log=True, y_label="BLEU, all spans restored at once", y_max=1),
            Plot("line", "spans", "bleu_by_span", "subject", x_log=True, y_label="BLEU, span by span", y_max=1),
        ],
        found.samples,
        headline=_HEADLINE,
    )


def _add_restoration(
    row: dict[str, Any],
    samples: list[dict[str, Any]],
    subject: Subject,
    excerpts: Sequence[Excerpt],
    bench: Workbench,
) -> None:
    """Add the figures of restoring the contexts to a row and its samples."""
    contexts = [e.ids for e in excerpts]
    scores = Scores.total(restoration_scores(subject, contexts, bench))
    row |= {"accuracy": scores.accuracy, "loss": scores.mean_loss}
    if row["context"] <= WRITTEN_TOKENS:
        restored, records = restoration_row(subject, excerpts, bench)
        decode = subject.icae.tokenizer.decode
        by_span = [
            decode(ids, skip_special_tokens=True) for ids in restored_ids(subject, contexts, bench, by_span=True)
        ]
        restored["bleu_by_span"] = corpus_bleu(by_span, [record["original"] for record in records])
        row |= {name: restored[name] for name in _WRITTEN}
        for sample, record, text in zip(samples, records, by_span, strict=True):
            sample |= record | {"restored_by_span": text}
