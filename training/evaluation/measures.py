"""Metrics of texts, token ids and losses: BLEU, exact prefix, perplexity, quartiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from icae_fast.io import packages


def optional_package(name: str) -> Any:
    """Import a module of the extra `eval`.

    Raises:
        MissingPackageError: it is not installed.
    """
    return packages.optional_package(name, "evaluating", "eval")


def corpus_bleu(restored: Sequence[str], originals: Sequence[str]) -> float:
    """Return the BLEU-4 of a corpus, 0 to 1.

    Args:
        restored: one text per original.
        originals: the references.
    """
    return _unit(optional_package("sacrebleu").BLEU().corpus_score(list(restored), [list(originals)]).score)


def bleu_signature() -> str:
    """Return sacrebleu's signature of `corpus_bleu`."""
    metric = optional_package("sacrebleu").BLEU()
    metric.corpus_score([""], [[""]])  # the signature includes the number of references, known only after a score
    return str(metric.get_signature())


def sentence_bleu(restored: str, original: str) -> float:
    """Return the BLEU of one passage, 0 to 1; passages of fewer than four words are scored on their n-grams."""
    metric = optional_package("sacrebleu").BLEU(effective_order=True)
    return _unit(metric.sentence_score(restored, [original]).score)


def _unit(score: float) -> float:
    return min(score / 100, 1.0)  # sacrebleu computes exp(log(100)), which may be slightly above 100


def exact_prefix(original: Sequence[int], restored: Sequence[int]) -> float:
    """Return the share of the original before the first wrong or missing token, 0 to 1.

    Args:
        original: ids, at least one.
        restored: ids; those beyond the original's length are ignored.
    """
    right = 0
    for a, b in zip(original, restored, strict=False):
        if a != b:
            break
        right += 1
    return right / len(original)


def perplexity(loss: float) -> float:
    """Return `exp(loss)` of a mean loss in nats, infinity on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile, interpolated linearly.

    Args:
        values: at least one value.
    """
    import numpy as np

    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)
