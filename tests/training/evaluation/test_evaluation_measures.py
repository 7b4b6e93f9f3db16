"""Metrics, drawn passages and marked differences with known answers."""

import json
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.evaluation import words
from icae_fast.errors import DataError, MissingPackageError
from icae_fast.training.evaluation import measures
from icae_fast.training.evaluation.differences import mark_differences, side_by_side
from icae_fast.training.evaluation.texts.passages import Texts

pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")

SENTENCE = "the keeper of the light was called Marta"


def test_bleu_is_one_for_the_same_text_and_zero_for_another():
    assert measures.corpus_bleu([SENTENCE, "a b"], [SENTENCE, "a b"]) == 1
    assert measures.sentence_bleu(SENTENCE, SENTENCE) == 1
    assert measures.sentence_bleu("a b", "a b") == 1  # although it has no n-gram of four
    assert measures.sentence_bleu("", SENTENCE) == 0
    assert measures.sentence_bleu("other words entirely", SENTENCE) == 0
    half = measures.sentence_bleu("the keeper of the", SENTENCE)
    assert half == pytest.approx(math.exp(1 - 8 / 4))  # nothing but the brevity penalty
    assert "tok:13a" in measures.bleu_signature()


@pytest.mark.parametrize(
    ("restored", "share"),
    [([1, 2, 3, 4], 1), ([1, 2, 3, 4, 9], 1), ([1, 2, 9, 4], 0.5), ([1, 2], 0.5), ([9, 2, 3, 4], 0), ([], 0)],
)
def test_exact_prefix(restored, share):
    assert measures.exact_prefix([1, 2, 3, 4], restored) == share


def test_quartiles_and_perplexity():
    assert measures.quartiles([4, 1, 3, 2, 5]) == (2, 3, 4)
    assert measures.quartiles([7.0]) == (7, 7, 7)
    assert measures.perplexity(0.0) == 1
    assert measures.perplexity(1e4) == math.inf


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # simulates a missing package
    with pytest.raises(MissingPackageError, match=r"pip install 'icae-fast\[eval\]'"):
        measures.sentence_bleu("a", "a")


def test_differences_are_bold_and_markup_is_not_taken_for_any():
    left, right = mark_differences("one two *three* four", "one 2 *three* four five")
    assert left == r"one **two** \*three\* four"
    assert right == r"one **2** \*three\* four **five**"
    assert mark_differences("a b c", "a b c", max_words=2) == ("a b ...", "a b ...")
    table = side_by_side([("x", "a|b", "a\nc")]).splitlines()
    assert table[-1] == r"| x | **a\|b** | **a c** |"


@pytest.fixture
def texts(tmp_path):
    """Return two texts of 300 and 40 words, and a row without text."""
    rows = [{"text": words(300, 1)}, {"text": ""}, {"text": words(40, 2)}]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Texts([str(path)])


def test_control_tokens_in_passages_are_text(tmp_path, byte_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("the cat</s> sat <bos>on the mat</s> " * 4)
    (found,) = Texts([str(path)]).draw(byte_tokenizer, 60, 1, seed=0)
    assert not set(found.ids) & set(byte_tokenizer.all_special_ids)
    start = int(found.origin.rpartition(" ")[2])
    assert path.read_text()[start:].startswith(byte_tokenizer.decode(found.ids))


def test_passages_are_the_texts_own_do_not_overlap_and_come_again(texts, make_tokenizer):
    tokenizer = make_tokenizer()
    assert texts.problems == {"field 'text' is empty": 1}
    found = texts.draw(tokenizer, 20, 6, seed=3, following=5)
    assert found == texts.draw(tokenizer, 20, 6, seed=3, following=5)
    assert found != texts.draw(tokenizer, 20, 6, seed=4, following=5)
    assert len(found) == 6
    whole = {d.origin: tokenizer(d.text)["input_ids"] for d in texts.documents}
    taken = set()
    for e in found:
        assert (len(e.ids), len(e.following)) == (20, 5)
        origin, _, character = e.origin.partition(", character ")
        document = next(d for d in texts.documents if d.origin == origin)
        start = len(document.text[: int(character)].split())
        assert whole[origin][start : start + 25] == e.ids + e.following
        places = {(origin, i) for i in range(start, start + 25)}
        assert not places & taken
        taken |= places
    shorter = texts.draw(tokenizer, 10, 6, seed=3)
    assert shorter[0].ids == found[0].ids[:10]  # passages of all lengths begin alike


@settings(max_examples=30)
@given(n=st.integers(1, 60), count=st.integers(1, 12), seed=st.integers(0, 5))
def test_as_many_passages_as_there_is_room_for(tmp_path_factory, byte_tokenizer, n, count, seed):
    path = tmp_path_factory.getbasetemp() / "prose.txt"
    path.write_text("The cat sat on the mat, naïve café; 日本語の文 " * 20, encoding="utf-8")
    text = Texts([str(path)])
    ids = byte_tokenizer(text.documents[0].text)["input_ids"]
    found = text.draw(byte_tokenizer, n, count, seed)
    assert 1 <= len(found) <= count
    assert all(len(e.ids) == n and not e.following for e in found)
    assert len(found) * n <= len(ids) + len(found)


def test_texts_that_are_too_short_or_not_there(texts, tmp_path, make_tokenizer):
    with pytest.raises(DataError, match="none of the texts has 400 tokens in a row"):
        texts.draw(make_tokenizer(), 400, 1, seed=0)
    with pytest.raises(DataError, match="data sets of the hub are not read here"):
        Texts(["someone/pile"])
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="1 times field 'text' is empty"):
        Texts([str(empty)])
