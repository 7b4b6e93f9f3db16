"""ROUGE, exact match and F1 of known answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icae_fast.errors import MissingPackageError
from icae_fast.training.evaluation.instructions import overlap
from icae_fast.training.evaluation.instructions.overlap import exact_match, normalised_words, rouge, word_f1


def test_rouge_of_known_answers():
    assert rouge("the cat sat", "the cat sat") == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert rouge("", "the cat sat") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    # 3 of 4 words each way, one of three bigrams, and "police the" as the longest subsequence: Lin's own example.
    scores = rouge("police kill the gunman", "police killed the gunman")
    assert scores == {"rouge1": 1, "rouge2": 1, "rougeL": 1}  # stemmed
    scores = rouge("the gunman killed police", "police killed the gunman")
    assert scores == {"rouge1": 1.0, "rouge2": pytest.approx(1 / 3), "rougeL": 0.5}
    # Precision 2/2 and recall 2/4.
    assert rouge("killed police", "police killed the gunman")["rouge1"] == pytest.approx(2 / 3)


def test_squads_normalisation():
    assert normalised_words("The Cat, a  cat's theatre!") == ["cat", "cats", "theatre"]
    assert exact_match("The  cat.", "a cat") == 1
    assert exact_match("The cats", "cat") == 0


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("the cat sat", "Cat sat.", 1.0),
        ("cat cat", "cat", 2 / 3),  # bags, not sets: precision 1/2, recall 1
        ("in the year 1066", "1066", 0.5),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 1.0),  # nothing but articles
    ],
)
def test_f1_of_known_answers(answer, reference, f1):
    assert word_f1(answer, reference) == pytest.approx(f1)


@given(a=st.text("ab the.", max_size=12), b=st.text("ab the.", max_size=12))
def test_f1_is_symmetric_and_1_where_the_match_is_exact(a, b):
    assert word_f1(a, b) == word_f1(b, a)
    assert word_f1(a, b) >= exact_match(a, b)


def test_a_missing_package_is_one_error(monkeypatch):
    overlap._scorer.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingPackageError, match=r"icae-fast\[eval\]"):
        rouge("a", "a")
