"""Several spans: the slots of many against as many raw tokens (the paper's 4,096 tokens in 1,024 slots)."""

from __future__ import annotations

from collections.abc import Sequence

from training.evaluation.continuation import (
    CONTINUATION_COLUMNS,
    CONTINUATION_TOKENS,
    continuation_row,
)
from training.evaluation.measures import bleu_signature
from training.evaluation.restoration import restoration_row
from training.evaluation.result import Plot, Result
from training.evaluation.subject import Subject
from training.evaluation.workbench import Cases, Workbench

SPANS = (1, 2, 4, 8)  # 8 spans of the paper's adapter are its 4,096 tokens
RESTORED = 4  # passages written out a row: thousands of tokens each

_RESTORATION = {
    "bleu": f"BLEU-4 of the restored contexts as one corpus (at most {RESTORED} of them), 0 to 1",
    "prefix_median": "median share of these before their first wrong token",
    "accuracy": "token accuracy of restoring them under teacher forcing",
}


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
                excerpts = bench.draw(subject, n * subject.span_tokens, CONTINUATION_TOKENS)
                row, samples = continuation_row(subject, excerpts, bench)
                row |= {"spans": n, **dict.fromkeys(_RESTORATION)}
                found.add(row, samples)
                with found.case(f"{case}, restored"):
                    restored, records = restoration_row(subject, excerpts[:RESTORED], bench)
                    row |= {name: restored[name] for name in _RESTORATION}
                    for sample, record in zip(samples, records, strict=False):
                        sample |= record
    found.check()
    columns = {"subject": "adapter and base model", "spans": "full spans of the context"}
    return Result(
        "several_spans",
        "Several spans against as many raw tokens",
        columns | CONTINUATION_COLUMNS | _RESTORATION,
        found.rows,
        {"continuation_tokens": CONTINUATION_TOKENS, "bleu": bleu_signature(), "skipped": found.skipped},
        ["Compare ppl_slots with ppl_truncated: the decoder has as many positions before the continuation in both."],
        [
            Plot("line", "spans", "over_truncated", "subject", x_log=True, y_label="nats a token less than raw tokens"),
            Plot("line", "spans", "bleu", "subject", x_log=True, y_label="BLEU of all spans restored", y_max=1),
        ],
        found.samples,
    )
