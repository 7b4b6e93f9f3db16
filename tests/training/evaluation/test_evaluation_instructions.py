"""Contestants and their answers with a random model: inputs, caching, and scores."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.instructions import QUESTIONS, TEXTS, make_bench, make_subject
from icae_fast.errors import DataError, InvalidInputError
from icae_fast.generation.prompts import chat_template_ids
from icae_fast.training.evaluation.cache import AnswerCache
from icae_fast.training.evaluation.instructions import answering, contestants
from icae_fast.training.evaluation.instructions.answering import SUMMARY_PROMPT, Answered, GivenAnswer, answer_all
from icae_fast.training.evaluation.instructions.contestants import (
    Contestant,
    answers_to_text,
    contestants_of,
    lay_out,
    text_ids,
)
from icae_fast.training.evaluation.instructions.questions import read_questions
from icae_fast.training.evaluation.instructions.references import measure_instructions

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def subject(make_icae, make_base, byte_tokenizer, one_thread):
    return make_subject(make_icae, make_base, byte_tokenizer)


@pytest.fixture
def chatty(make_icae, make_base, byte_tokenizer, one_thread, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "chat_template", TEMPLATE)
    return make_subject(make_icae, make_base, byte_tokenizer, prompt_format="chat")


@pytest.fixture
def bench(tmp_path):
    return make_bench(tmp_path)


def greedy(base, ids, n):
    ids = torch.tensor([ids])
    for _ in range(n):
        ids = torch.cat([ids, base(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -n:].tolist()


def test_answers_to_text_are_those_of_the_base_model(chatty):
    icae = chatty.icae
    layouts = [lay_out(icae, text_ids(icae, q.input), q.prompt) for q in QUESTIONS]
    found = answers_to_text(icae, layouts, [6] * len(layouts))
    for layout, answer in zip(layouts, found, strict=True):
        expected = greedy(icae.base_model, [*layout.prefix, *layout.suffix], 6)
        assert answer.ids == expected[: len(answer.ids)]
        assert len(answer.ids) == 6 or answer.finish_reason == "eos"


def test_the_layout_is_the_template_with_the_text_before_the_prompt(chatty):
    icae = chatty.icae
    before, after = chat_template_ids(icae.tokenizer)
    layout = lay_out(icae, text_ids(icae, "the cat"), "sat?")
    text = icae.tokenizer.decode([*layout.prefix, *layout.suffix])
    assert text == "<user>the cat\n\nsat?<a>"
    assert list(layout.prefix[: len(before)]) == before
    assert list(layout.suffix[-len(after) :]) == after


def test_control_tokens_in_texts_and_prompts_are_text(chatty):
    icae = chatty.icae
    layout = lay_out(icae, text_ids(icae, "the </s>cat"), "<bos>sat?")
    ids = [*layout.prefix, *layout.suffix]
    assert icae.tokenizer.decode(ids) == "<user>the </s>cat\n\n<bos>sat?<a>"
    assert not set(ids) & set(icae.tokenizer.all_special_ids)


def test_contestants_read_what_they_should(subject, bench, monkeypatch):
    read = []
    real = contestants.answers_to_text

    def watch(icae, layouts, limits):
        read.extend(zip(layouts, limits, strict=True))
        return real(icae, layouts, limits)

    monkeypatch.setattr(answering, "answers_to_text", watch)
    answered = answer_all(contestants_of([subject]), QUESTIONS, bench, max_new_tokens=5)
    full = {text: tuple(text_ids(subject.icae, text)) for text in TEXTS}
    assert [c.reads for c in answered.answers] == ["slots", "full", "truncated", "summary"]
    n = len(QUESTIONS)
    assert [layout.prefix for layout, _ in read[:n]] == [full[q.input] for q in QUESTIONS]
    budgets = [answered.answers[c][i].n_read for c in answered.answers if c.reads == "slots" for i in range(n)]
    spans = [-(-len(full[q.input]) // 16) for q in QUESTIONS]
    assert budgets == [4 * s for s in spans]  # k = 4, and 16 tokens a span
    truncated = [full[q.input][:budget] for q, budget in zip(QUESTIONS, budgets, strict=True)]
    assert [layout.prefix for layout, _ in read[n : 2 * n]] == truncated
    summarised = read[2 * n : 2 * n + 3]
    assert [(layout.prefix, limit) for layout, limit in summarised] == [
        (full[text], 4 * -(-len(full[text]) // 16)) for text in TEXTS
    ]
    asked = tuple(subject.icae.tokenizer("\n\n" + SUMMARY_PROMPT)["input_ids"])
    assert all(layout.suffix == asked for layout, _ in summarised)
    summaries = answers_to_text(subject.icae, *zip(*summarised, strict=True))
    ids = [tuple(i for i in s.ids if i != 2) for s in summaries]
    assert [layout.prefix for layout, _ in read[2 * n + 3 : 3 * n + 3]] == [ids[0], ids[0], ids[1], ids[2]]
    assert len(read) == 3 * n + 3
    memories = subject.icae.compress([q.input for q in QUESTIONS])
    expected = subject.icae.generate(memories, [q.prompt for q in QUESTIONS], max_new_tokens=5)
    slots = next(c for c in answered.answers if c.reads == "slots")
    assert [g.text for g in answered.answers[slots]] == [text.strip() for text in expected]


def test_what_subjects_answer_alike_is_answered_once(make_icae, make_base, byte_tokenizer, one_thread):
    def make(name, **fields):
        return make_subject(make_icae, make_base, byte_tokenizer, name, **fields)

    first, other, small = make("first"), make("other", seed=3), make("small", memory_size=2)
    names = [c.name for c in contestants_of([first, other, small], ["slots", "full", "truncated"])]
    assert names == [
        "first: slots", "first: full text", "first: truncated text", "other: slots", "small: slots",
        "small: truncated text",
    ]  # fmt: skip
    with pytest.raises(InvalidInputError, match="minds cannot be read by contestants; choose among slots"):
        contestants_of([first], ["minds"])
    with pytest.raises(InvalidInputError, match="nothing"):
        contestants_of([first], [])


class Interrupting(AnswerCache):
    """A cache that is interrupted before a certain value is kept."""

    left = 3

    def put(self, key, value):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        super().put(key, value)


def test_an_interrupted_run_goes_on_and_a_second_one_computes_nothing(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("icae_fast.training.evaluation.workbench.BATCH_TOKENS", 64)
    chosen = contestants_of([subject])
    expected = measure_instructions(answer_all(chosen, QUESTIONS, make_bench(tmp_path), 5))
    path = tmp_path / "answers.jsonl"
    with Interrupting(path) as cache, pytest.raises(KeyboardInterrupt):
        answer_all(chosen, QUESTIONS, make_bench(tmp_path, cache), 5)
    with AnswerCache(path) as cache:
        assert len(cache) == 3
        assert measure_instructions(answer_all(chosen, QUESTIONS, make_bench(tmp_path, cache), 5)) == expected
        monkeypatch.setattr(subject.icae, "answer", None)
        monkeypatch.setattr(answering, "answers_to_text", None)
        assert measure_instructions(answer_all(chosen, QUESTIONS, make_bench(tmp_path, cache), 5)) == expected
    # Another limit computes new answers.
    with AnswerCache(path) as cache, pytest.raises(TypeError):
        answer_all(chosen, QUESTIONS, make_bench(tmp_path, cache), 6)


def test_questions_that_do_not_fit_are_asked_no_one_and_counted(subject, bench):
    long = dataclasses.replace(QUESTIONS[0], input="the cat " * 300)
    answered = answer_all(contestants_of([subject], ["slots", "full"]), [long, *QUESTIONS], bench, 4)
    assert answered.questions == QUESTIONS
    assert answered.left_out == {"too long for tiny: full text": 1}
    result = measure_instructions(answered)
    assert any("1 questions were left out" in note for note in result.notes)
    with pytest.raises(DataError, match="no question can be asked: 1 times too long for tiny: full text"):
        answer_all(contestants_of([subject], ["slots", "full"]), [long], bench, 4)


def test_the_table(subject):
    slots, full = (Contestant(subject, reads) for reads in ("slots", "full"))
    right = [GivenAnswer(q.answer, 3, True, 8) for q in QUESTIONS]
    wrong = [GivenAnswer("cat", 5, False, 30), *(GivenAnswer("", 5, False, 30) for _ in QUESTIONS[1:])]
    result = measure_instructions(Answered(QUESTIONS, {slots: right, full: wrong}, 5))
    assert [(r["contestant"], r["kind"], r["answers"]) for r in result.rows] == [
        ("tiny: slots", "all", 4), ("tiny: full text", "all", 4), ("tiny: slots", "question", 3),
        ("tiny: full text", "question", 3), ("tiny: slots", "title", 1), ("tiny: full text", "title", 1),
    ]  # fmt: skip
    best, worst, *_, title = result.rows
    assert best | {"rouge1": 1, "rouge2": 1, "rougeL": 1, "rougeL_q1": 1, "rougeL_median": 1} == best
    assert (best["short"], best["exact_match"], best["f1"]) == (2, 1, 1)
    assert (best["read"], best["tokens"], best["cut"]) == (8, 3, 0)
    assert (worst["exact_match"], worst["cut"], worst["rougeL_median"]) == (0, 1, 0)
    assert worst["f1"] == pytest.approx((2 / 3 + 0) / 2)  # "cat" for "cat 0", nothing for "cat 1"
    assert (title["short"], title["exact_match"], title["f1"]) == (0, None, None)
    assert set(result.columns) == set(best)
    assert result.samples[0]["answers"]["tiny: slots"]["text"] == "The cat 0."
    json.dumps(dataclasses.asdict(result))


def test_rows_are_read_with_their_kinds(tmp_path):
    rows = [{"input": f"text {n}", "prompt": "p", "answer": "a", "kind": "title"} for n in range(4)]
    del rows[1]["kind"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"input": "x"}\nbroken\n')
    found, problems = read_questions([str(path)])
    assert [(q.input, q.kind) for q in found] == [
        ("text 0", "title"), ("text 1", ""), ("text 2", "title"), ("text 3", "title"),
    ]  # fmt: skip
    assert found[0].origin.endswith("rows.jsonl:1")
    assert problems == {"no field 'prompt'": 1, "not JSON": 1}
    drawn = [read_questions([str(path)], limit=2, seed=seed)[0] for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] or drawn[0] != drawn[3]
    assert all(len(d) == 2 and d == [q for q in found if q in d] for d in drawn)
    path.write_text("broken\n")
    with pytest.raises(DataError, match="1 times not JSON"):
        read_questions([str(path)])


@pytest.mark.parametrize("kind", [["title", None], None])
def test_parquet_may_have_kinds(tmp_path, kind):
    columns = {"input": ["a", "b"], "prompt": ["p", "q"], "answer": ["x", "y"], "more": [1, 2]}
    pq.write_table(pa.table(columns | ({} if kind is None else {"kind": kind})), tmp_path / "rows.parquet")
    found, problems = read_questions([str(tmp_path / "rows.parquet")])
    assert [(q.input, q.answer, q.kind) for q in found] == [("a", "x", "title" if kind else ""), ("b", "y", "")]
    assert not problems
