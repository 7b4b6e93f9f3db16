"""Reading texts, cutting them into passages, and parsing a teacher's replies."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icae_fast.errors import DataError
from icae_fast.training.pwc.passages import Document, count_words, read_documents, split
from icae_fast.training.pwc.prompts import KINDS, parse_answer, parse_pairs, parse_questions, wording


def texts_of(document, limit, count=count_words):
    return [p.text for p in split(Document(document, "d"), limit, count)]


def test_passages_end_with_paragraphs_then_sentences_then_words():
    text = "One two three.\n\nFour five. Six seven eight.\n\nNine."
    assert texts_of(text, 100) == [text]
    assert texts_of(text, 8) == ["One two three.\n\nFour five. Six seven eight.", "Nine."]
    assert texts_of(text, 4) == ["One two three.", "Four five.", "Six seven eight.\n\nNine."]
    assert texts_of(text, 2) == ["One two", "three.", "Four five.", "Six seven", "eight.\n\nNine."]
    assert texts_of('He said "stop." Then he left.', 3) == ['He said "stop."', "Then he left."]
    assert texts_of("短い文。もう一つの文。", 8) == ["短い文。", "もう一つの文。"]
    assert texts_of("abcdefgh", 3, len) == ["ab", "cd", "ef", "gh"]
    assert texts_of(" \n ", 3) == []


def test_passages_know_what_follows_and_where_they_are_from():
    first, second = split(Document("One two.\n\nThree four.", "a.txt"), 2, count_words)
    assert (first.following, second.following) == ("Three four.", "")
    assert (first.origin, second.origin) == ("a.txt#1", "a.txt#2")
    assert split(Document("One two.", "a.txt"), 2, count_words)[0].origin == "a.txt"
    assert first.key == split(Document(" One two. ", "b.txt"), 5, count_words)[0].key != second.key


@given(st.text(st.sampled_from("ab .!?\n\t\"')。文\u2028"), max_size=200), st.integers(1, 12))
def test_nothing_is_lost_and_no_passage_is_too_long(text, limit):
    passages = split(Document(text, "d"), limit, count_words)
    assert "".join("".join(p.text.split()) for p in passages) == "".join(text.split())
    assert all(0 < p.size <= limit and p.text == p.text.strip() for p in passages)


def test_passages_in_tokens_are_not_too_long(byte_tokenizer, long_text):
    def count(text):
        return len(byte_tokenizer(text, add_special_tokens=False)["input_ids"])

    passages = split(Document(long_text[:6000], "d"), 120, count)
    assert "".join("".join(p.text.split()) for p in passages) == "".join(long_text[:6000].split())
    assert all(count(p.text) <= 120 for p in passages)


def test_folders_files_and_lines_are_read_in_order_and_bad_ones_are_named(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "d.txt").write_bytes(b"ab\xff")
    (tmp_path / "ignored.csv").write_text("x")
    (tmp_path / "out.jsonl").write_text('{"text": "output"}\n')
    rows = [
        '{"text": "A1"}',
        "",
        '{"text": "A2 \\ud800"}',
        "{",
        "[1]",
        '{"text": 3}',
        '{"text": " "}',
        '{"text": "A8"}',
    ]
    (tmp_path / "sub" / "a.jsonl").write_bytes("\n".join(rows).encode() + b'\n{"text": "\xff"}')
    bad = []
    documents = list(read_documents([tmp_path], bad.append, exclude=tmp_path / "out.jsonl"))
    lines = str(tmp_path / "sub" / "a.jsonl")
    assert [(d.text, d.origin) for d in documents] == [
        ("B", str(tmp_path / "b.txt")), ("A1", f"{lines}:1"), ("A8", f"{lines}:8"),
    ]  # fmt: skip
    assert [line.split(": ")[0] for line in bad] == [
        str(tmp_path / "c.txt"), str(tmp_path / "d.txt"), *(f"{lines}:{n}" for n in (3, 4, 5, 6, 7, 9)),
    ]  # fmt: skip


def test_a_path_without_texts_is_an_error(tmp_path):
    (tmp_path / "notes.csv").write_text("x")
    for path, message in ((tmp_path, "no file of a known extension"), (tmp_path / "notes.csv", "unknown extension")):
        with pytest.raises(DataError, match=message):
            list(read_documents([path], print))
    with pytest.raises(DataError, match="there is no"):
        list(read_documents([tmp_path / "absent"], print))
    with pytest.raises(DataError, match="no file or folder"):
        list(read_documents(["no/folder"], print))  # as a data set on the hub might be called


@pytest.mark.parametrize(
    ("reply", "questions"),
    [
        ("Sure, here:\n1. Who?\n2) What is 'it'?\n\nHope this helps", ["Who?", "What is 'it'?"]),
        ("**1.** Who?\nQ2: When?\n- Where?", ["Who?", "When?", "Where?"]),
        ("The prompts:\nName the keeper.\n3.5 tons of it?\nName the KEEPER.", ["Name the keeper.", "3.5 tons of it?"]),
        ('```json\n["Who?", "Why [1]?"]\n```', ["Who?", "Why [1]?"]),
        ('{"prompts": ["Who?"]}', ["Who?"]),
        ("<think>1. Hm?</think>\n1.Who?\n2. Known?\n3. 42", ["Who?"]),
        (f"1. {'a' * 501}\n2. Who?", ["Who?"]),
    ],
)  # fmt: skip
def test_lists_of_questions_are_read_leniently(reply, questions):
    assert parse_questions(reply, known=["known?"]) == questions


@pytest.mark.parametrize(
    ("reply", "pairs"),
    [
        ('So: [{"prompt": "P?", "answer": " A "}, {"prompt": "Q", "answer": "B"}] Bye [1].', [("P?", "A"), ("Q", "B")]),
        ('```json\n{"items": [{"question": "P?", "response": "A\nB"}]}\n```', [("P?", "A\nB")]),
        ('[{"prompt": "P?", "answer": "A"}, {"prompt": "Q", "ans', [("P?", "A")]),
        ('{"prompt": "P", "answer": 3}{"prompt": "known?", "answer": "A"}{"prompt": "R", "answer": "C"}', [("R", "C")]),
        (json.dumps({"prompt": "P \ud83d", "answer": "A \ud83d"}), [("P ?", "A ?")]),
    ],
)  # fmt: skip
def test_pairs_are_read_leniently(reply, pairs):
    assert parse_pairs(reply, known=["Known?"]) == pairs


@pytest.mark.parametrize("parse", [parse_answer, parse_questions, parse_pairs])
@pytest.mark.parametrize("reply", ["", " \n", "<think>hm</think> "])
def test_an_empty_reply_is_refused(parse, reply):
    with pytest.raises(ValueError, match="empty"):
        parse(reply)


def test_a_reply_that_repeats_the_prompt_is_refused():
    with pytest.raises(ValueError, match="repeats the prompt"):
        parse_answer(" who? ", "Who?")


@given(st.text(st.sampled_from('[]{}",:\\ \n1.)aé-*'), max_size=80))
def test_no_reply_is_too_odd(reply):
    for parse in (parse_questions, parse_pairs):
        with contextlib.suppress(ValueError):
            assert parse(reply)


def test_all_wordings_come_up():
    for kind, wordings in KINDS.items():
        assert {wording(kind, f"{n:016x}") for n in range(9)} == set(wordings)
