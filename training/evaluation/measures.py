"""What is computed of texts, token ids and losses: BLEU, exact prefix, perplexity, quartiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from icae_fast.io import packages


def optional_package(name: str) -> Any:
    """A module of the extra `eval`.

    Raises:
        MissingPackageError: it is not installed.
    """
    return packages.optional_package(name, "evaluating", "eval")


def corpus_bleu(restored: Sequence[str], originals: Sequence[str]) -> float:
    """BLEU-4 of a corpus, 0 to 1.

    Args:
        restored: a text for each original.
        originals: the one reference of each.
    """
    return _unit(optional_package("sacrebleu").BLEU().corpus_score(list(restored), [list(originals)]).score)


def bleu_signature() -> str:
    """How sacrebleu computes `corpus_bleu`, in its own notation."""
    metric = optional_package("sacrebleu").BLEU()
    metric.corpus_score([""], [[""]])  # before, it does not know the number of references
    return str(metric.get_signature())


def sentence_bleu(restored: str, original: str) -> float:
    """BLEU of one passage, 0 to 1; of a passage of fewer than four words, over the n-grams that it has."""
    metric = optional_package("sacrebleu").BLEU(effective_order=True)
    return _unit(metric.sentence_score(restored, [original]).score)


def _unit(score: float) -> float:
    return min(score / 100, 1.0)  # sacrebleu's 100 comes out of exp(log(100)), and may be a little more


def exact_prefix(original: Sequence[int], restored: Sequence[int]) -> float:
    """Share of the original before the first wrong or missing token, 0 to 1.

    Args:
        original: at least one token.
        restored: what lies beyond the original's length is not looked at.
    """
    right = 0
    for a, b in zip(original, restored, strict=False):
        if a != b:
            break
        right += 1
    return right / len(original)


def perplexity(loss: float) -> float:
    """`exp(loss)` of a mean loss in nats; infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, interpolated linearly.

    Args:
        values: at least one.
    """
    import numpy as np

    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)
