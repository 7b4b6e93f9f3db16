"""Several spans: the slots of many against as many raw tokens (the paper's 4,096 tokens in 1,024 slots)."""

from __future__ import annotations

from collections.abc import Sequence

from icae_fast.training.evaluation.measures import bleu_signature, corpus_bleu
from icae_fast.training.evaluation.result import Plot, Result
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.texts.continuation import (
    CONTINUATION_COLUMNS,
    CONTINUATION_TOKENS,
    continuation_row,
)
from icae_fast.training.evaluation.texts.reading import Scores, restoration_scores, restored_ids
from icae_fast.training.evaluation.texts.restoration import restoration_row
from icae_fast.training.evaluation.workbench import Cases, Workbench

SPANS = (1, 2, 4, 8)  # 8 spans of the paper's adapter are its 4,096 tokens
WRITTEN_TOKENS = 2048  # of the longest contexts that are written out: more would take hours on a CPU

_WRITTEN = {
    "bleu": "BLEU-4 of the restored contexts as one corpus, 0 to 1",
    "prefix_median": "median share of these before their first wrong token",
    "bleu_by_span": "BLEU-4 of the same contexts, where each span is restored from its own slots alone",
}
_FORCED = {
    "accuracy": "token accuracy of restoring under teacher forcing",
    "loss": "cross-entropy of restoring under teacher forcing, nats a token",
}
_HEADLINE = ("subject", "spans", "slots", "ppl_text", "ppl_slots", "ppl_truncated", "bleu", "bleu_by_span")


def several_spans(subjects: Sequence[Subject], bench: Workbench, spans: Sequence[int] = SPANS) -> Result:
    """Continuation behind the slots of n full spans and behind as many raw tokens, and restoration of n spans.

    Args:
        subjects: measured side by side.
        bench: gives passages.
        spans: n; what texts or positions do not allow is listed in the facts.

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
            "Compare ppl_slots with ppl_truncated: the decoder has as many positions before the continuation in both.",
            "bleu is of contexts written from all slots at once, bleu_by_span span by span (`ICAE.restore_by_span`).",
            "Contexts of several spans are fewer, so that all rows take about as long, and those of more than "
            f"{WRITTEN_TOKENS:,} tokens are not written out.",
        ],
        [
            Plot(
                "line", "spans", "over_truncated", "subject", x_log=True, y_label="gain over raw tokens, nats a token"
            ),
            Plot("line", "spans", "bleu", "subject", x_log=True, y_label="BLEU, all spans restored at once", y_max=1),
            Plot("line", "spans", "bleu_by_span", "subject", x_log=True, y_label="BLEU, span by span", y_max=1),
        ],
        found.samples,
        headline=_HEADLINE,
    )


def _add_restoration(row, samples, subject, excerpts, bench):
    """Adds to a row and its samples what restoring the contexts gives."""
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
