"""Overlap of an answer with a reference: ROUGE, and SQuAD's exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import cache
from typing import Any

from icae_fast.training.evaluation.measures import optional_package

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge(answer: str, reference: str) -> dict[str, float]:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, over Porter-stemmed words.

    rouge_score's words are ASCII letters and digits, so texts in other scripts score 0.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.

    Raises:
        InvalidInputError: the package rouge-score is not installed.
    """
    scores = _scorer().score(reference, answer)
    return {name: scores[name].fmeasure for name in ROUGE_TYPES}


@cache
def _scorer() -> Any:
    return optional_package("rouge_score.rouge_scorer").RougeScorer(list(ROUGE_TYPES), use_stemmer=True)


def normalised_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without articles and ASCII punctuation.

    Source: the evaluation of SQuAD, Rajpurkar et al., arXiv 1606.05250, section 6.1.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the normalised words are equal, else 0."""
    return float(normalised_words(answer) == normalised_words(reference))


def word_f1(answer: str, reference: str) -> float:
    """Return the F1 of the bags of normalised words, 0 to 1; if one is empty, 1 if both are, else 0."""
    ours, theirs = (Counter(normalised_words(text)) for text in (answer, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total())
