"""Metrics of texts, token ids and losses: BLEU, exact prefix, perplexity, quartiles."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from icae_fast.io import packages


def optional_package(name: str) -> Any:
    """Import a module of the extra `eval`.

    Raises:
        MissingPackageError: it is not installed.
    """
    return packages.optional_package(name, "evaluating", "eval")


# Han, kana, Thai, Lao, Myanmar and Khmer have no spaces between words: as for sacrebleu's own `zh`, a character is a
# word. `zh` knows no kana, and splits English text otherwise than the default tokenizer.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


def _spaced(text: str) -> str:
    """Return a text with spaces around the characters of scripts that have none between words."""
    return _SPACELESS.sub(r" \g<0> ", text)


def corpus_bleu(restored: Sequence[str], originals: Sequence[str]) -> float:
    """Return the BLEU-4 of a corpus, 0 to 1; characters of scripts without spaces count as words.

    Args:
        restored: one text per original.
        originals: the references.
    """
    metric = optional_package("sacrebleu").BLEU()
    return _unit(metric.corpus_score([_spaced(t) for t in restored], [[_spaced(t) for t in originals]]).score)


def bleu_signature() -> str:
    """Return sacrebleu's signature of `corpus_bleu`, and what is done before."""
    metric = optional_package("sacrebleu").BLEU()
    metric.corpus_score([""], [[""]])  # the signature includes the number of references, known only after a score
    return f"{metric.get_signature()}|spaceless:characters"


def sentence_bleu(restored: str, original: str) -> float:
    """Return the BLEU of one passage, 0 to 1; passages of fewer than four words are scored on their n-grams."""
    metric = optional_package("sacrebleu").BLEU(effective_order=True)
    return _unit(metric.sentence_score(_spaced(restored), [_spaced(original)]).score)


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
