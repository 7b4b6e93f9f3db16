"""Text continuation: the decoder's perplexity after slots, against its perplexity after text.

Four inputs precede the same continuation, and the same tokens of it are scored:

    full text    the context
    slots        the slots of the context
    truncated    the context's last tokens, as many as there are slots
    nothing      nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from icae_fast.training.evaluation.measures import bleu_signature, perplexity
from icae_fast.training.evaluation.result import Plot, Result
from icae_fast.training.evaluation.subject import MEMORY_SIZES, Subject
from icae_fast.training.evaluation.texts.passages import Excerpt
from icae_fast.training.evaluation.texts.published import PAPER_TABLE_6
from icae_fast.training.evaluation.texts.restoration import restoration_row
from icae_fast.training.evaluation.texts.scoring import UNSCORED, Scores, slot_scores, text_scores
from icae_fast.training.evaluation.workbench import Cases, Workbench

CONTINUATION_TOKENS = 128
TABLE_6_TOKENS = 512  # length of the paper's contexts

CONTINUATION_COLUMNS = {
    "context": "tokens of the context",
    "slots": "slots that it is compressed into",
    "ratio": "context tokens per slot",
    "passages": "passages measured",
    "ppl_text": "perplexity of the continuation after the full text",
    "ppl_slots": "perplexity after the slots",
    "ppl_truncated": "perplexity after the last tokens of the text, as many as there are slots",
    "ppl_nothing": "perplexity without a context",
    "loss_added": "cross-entropy after the slots minus that after the full text, nats per token",
    "over_truncated": "cross-entropy after the truncated text minus that after the slots, nats per token",
    "kept": "share of the full text's information that the slots keep, (nothing - slots) / (nothing - full text) in "
    "nats; empty if the text is worth less than 0.01",
}
_RESTORATION = {
    "restored": "contexts that were restored",
    "bleu": "BLEU-4 of the restored contexts as one corpus, 0 to 1",
    "loss": "cross-entropy of restoring under teacher forcing, nats per token",
    "accuracy": "token accuracy of restoring under teacher forcing",
}
_LEAST_TOLD = 0.01  # nats per token; a share of less would be noise
_FACTS = {"continuation_tokens": CONTINUATION_TOKENS, "unscored_first_tokens": UNSCORED}


def continuation_row(
    subject: Subject, excerpts: Sequence[Excerpt], bench: Workbench
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the continuation of passages of one length.

    Args:
        subject: the adapter.
        excerpts: at least one passage, with the tokens that follow it.
        bench: caches scores.

    Returns:
        `subject` and the cells of `CONTINUATION_COLUMNS`, and a record of each passage. If the full text does not fit
        into the base model's positions, the cells that depend on it are None.
    """
    contexts, following = [e.ids for e in excerpts], [e.following for e in excerpts]
    n, slots = len(contexts[0]), subject.n_slots(len(contexts[0]))
    readers = {
        "slots": slot_scores(subject, contexts, following, bench),
        "truncated": text_scores(subject, [c[-slots:] for c in contexts], following, bench),
        "nothing": text_scores(subject, [[] for _ in contexts], following, bench),
    }
    if n + len(following[0]) <= subject.icae.max_positions:
        readers["text"] = text_scores(subject, contexts, following, bench)
    losses = {name: Scores.total(scores).mean_loss for name, scores in readers.items()}
    row = dict.fromkeys(CONTINUATION_COLUMNS) | {
        "subject": subject.name, "context": n, "slots": slots, "ratio": n / slots, "passages": len(excerpts),
        **{f"ppl_{name}": perplexity(loss) for name, loss in losses.items()},
        "over_truncated": losses["truncated"] - losses["slots"],
    }  # fmt: skip
    if "text" in losses:
        told = losses["nothing"] - losses["text"]
        row["loss_added"] = losses["slots"] - losses["text"]
        row["kept"] = (losses["nothing"] - losses["slots"]) / told if told > _LEAST_TOLD else None
    samples = [
        {"subject": subject.name, "context": n, "slots": slots, "origin": e.origin}
        | {f"loss_{name}": scores[i].mean_loss for name, scores in readers.items()}
        for i, e in enumerate(excerpts)
    ]
    return row, samples


def continuation_by_ratio(
    subjects: Sequence[Subject], bench: Workbench, memory_sizes: Sequence[int] = MEMORY_SIZES
) -> Result:
    """Measure the perplexity of the text after a full span by compression ratio.

    The ratio is varied through k: the first k' memory tokens of an adapter.

    Args:
        subjects: adapters to measure side by side.
        bench: draws passages.
        memory_sizes: values of k; unsupported ones are left out, and an adapter's own k is always included.

    Raises:
        DataError: nothing can be measured.
    """
    found = Cases()
    for subject in subjects:
        for k in subject.memory_sizes(memory_sizes):
            with found.case(f"{subject.name}, {k} slots"):
                excerpts = bench.draw(subject, subject.span_tokens, CONTINUATION_TOKENS)
                found.add(*continuation_row(subject.with_memory_size(k), excerpts, bench))
    found.check()
    return Result(
        "continuation_by_ratio",
        "Continuation by compression ratio",
        {"subject": "adapter and base model"} | CONTINUATION_COLUMNS,
        found.rows,
        _FACTS | {"skipped": found.skipped},
        [
            f"The first {UNSCORED} tokens of a continuation are not scored, with any input, as in training.",
            "An adapter that was trained with a single k is not expected to work with others.",
        ],
        [
            Plot("line", "ratio", y, "subject", x_log=True, x_label="context tokens per slot", y_label=label)
            for y, label in (
                ("loss_added", "loss added by compressing, nats per token"),
                ("kept", "share of the text's information kept"),
            )
        ],
        found.samples,
        headline=("subject", "slots", "ratio", "ppl_text", "ppl_slots", "ppl_truncated", "ppl_nothing"),
    )


def table_6(subjects: Sequence[Subject], bench: Workbench) -> Result:
    """Measure the paper's Table 6: restoration and continuation of 512 tokens, with the paper's figures.

    Args:
        subjects: adapters to measure side by side.
        bench: draws passages; an adapter with shorter spans uses several spans for one passage.

    Raises:
        DataError: nothing can be measured.
    """
    n, found = TABLE_6_TOKENS, Cases()
    nothing: dict[str, Any] = {}
    for subject in subjects:
        with found.case(subject.name):
            excerpts = bench.draw(subject, n, CONTINUATION_TOKENS)
            chosen = excerpts[: bench.affordable(subjects, n)]
            restored, records = restoration_row(subject, chosen, bench)
            row, continued = continuation_row(subject, excerpts, bench)
            restored["restored"] = len(chosen)
            row |= {name: restored[name] for name in _RESTORATION} | {"source": "measured here"}
            found.add(row, [a | b for a, b in zip_longest(records, continued, fillvalue=nothing)])
    found.check()
    published = [
        {"subject": name, "source": PAPER_TABLE_6.source, "context": n, "slots": 128} | figures
        for name, figures in PAPER_TABLE_6.figures.items()
    ]
    names = ("context", "slots", "passages", "ppl_text", "ppl_slots", "ppl_truncated", "ppl_nothing")
    columns = {name: CONTINUATION_COLUMNS[name] for name in names}
    return Result(
        "table_6",
        f"The paper's Table 6: {n} tokens restored and continued",
        {"subject": "adapter and base model", "source": "where the figures are from"} | _RESTORATION | columns,
        found.rows + published,
        _FACTS | {"bleu": bleu_signature(), "skipped": found.skipped},
        [f"Published figures are of {PAPER_TABLE_6.what}, on other texts and with other tokenizers."],
        samples=found.samples,
        headline=("subject", "bleu", "loss", "context", "slots", "ppl_text", "ppl_slots"),
    )
