"""Judging pairs with a server that stalls, fails and replies nonsense, with biased judges, and after interruptions."""

import asyncio
import dataclasses
import json
from collections import Counter

import pytest

from helpers.chat import ChatServer, ScriptedTeacher, completion
from helpers.instructions import QUESTIONS, SHOWN, longer_wins, make_bench, make_subject
from icae_fast.errors import ChatModelError, InvalidInputError
from icae_fast.training.chat import EndpointModel, RequestFailed
from icae_fast.training.chat.local import LocalModel
from icae_fast.training.evaluation.cache import AnswerCache
from icae_fast.training.evaluation.instructions.answering import Answered, GivenAnswer
from icae_fast.training.evaluation.instructions.contestants import Contestant, contestants_of
from icae_fast.training.evaluation.instructions.judge import default_pairs, judge_pairs
from icae_fast.training.evaluation.instructions.plan import Instructions, load_judge
from icae_fast.training.evaluation.instructions.verdicts import judge_request, outcome, parse_verdict

N = len(QUESTIONS)


@pytest.fixture
def answered(make_icae, make_base, byte_tokenizer):
    """Return answers in which slots are longer than the full text for two questions, shorter for one, equal for one."""
    subject = make_subject(make_icae, make_base, byte_tokenizer)
    ours, theirs = ["long answer", "a longer one", "no", "same"], ["short", "brief", "longest of all", "same"]
    answers = {
        Contestant(subject, reads): [GivenAnswer(text, 3, True, 8) for text in texts]
        for reads, texts in (("slots", ours), ("full", theirs))
    }
    return Answered(QUESTIONS, answers, 5)


@pytest.fixture
def bench(tmp_path):
    return make_bench(tmp_path)


@pytest.fixture
def cache_path(tmp_path):
    return tmp_path / "answers.jsonl"


async def ask_once(judge):
    async with judge:
        return await judge.ask("Paragraph 1", str)


class Judge(ScriptedTeacher):
    """A chat model that replies with `reply(message)`, unless its script holds something else."""

    def __init__(self, reply=longer_wins, script=()):
        super().__init__(script)
        self.reply = reply

    async def ask(self, message, parse):
        self.script = self.script or [None]
        self.script[0] = self.script[0] or self.reply(message)
        return await super().ask(message, parse)


def endpoint(server, **options):
    return EndpointModel(server.url, "judge", **{"backoff": 0.01, "timeout": 10.0, "retries": 1} | options)


def row_of(result):
    (row,) = result.rows
    return {name: row[name] for name in ("win", "lose", "tie", "same", "unparsed", "failed", "not_asked")}


def counts(**given):
    return dict.fromkeys(("win", "lose", "tie", "same", "unparsed", "failed", "not_asked"), 0) | given


def test_both_orders_are_asked_and_have_to_agree(answered, bench):
    judge = Judge()
    result = judge_pairs(answered, judge, bench)
    assert row_of(result) == counts(win=2, lose=1, tie=1, same=1)
    (row,) = result.rows
    assert (row["contestant"], row["opponent"]) == ("tiny: slots", "tiny: full text")
    assert (row["pairs"], row["judged"], row["on_par"], row["consistent"]) == (4, 4, 0.75, 1)
    assert set(row) == set(result.columns)
    shown = Counter(SHOWN.search(message).groups() for message in judge.messages)
    pairs = [("long answer", "short"), ("a longer one", "brief"), ("no", "longest of all")]
    assert shown == Counter([*pairs, *(pair[::-1] for pair in pairs)])
    for message in judge.messages:
        assert any(q.input in message and f"The prompt: {q.prompt}\n" in message for q in QUESTIONS)
    assert result.facts["verdicts"] == {"A": 3, "B": 3}
    json.dumps(dataclasses.asdict(result))
    assert [s["result"] for s in result.samples] == ["win", "win", "lose", "same"]


@pytest.mark.parametrize("place", ["A", "B", "TIE"])
def test_a_judge_that_looks_at_the_order_alone_gives_ties(answered, bench, place):
    result = judge_pairs(answered, Judge(lambda message: place), bench)
    assert row_of(result) == counts(tie=4, same=1)
    assert result.rows[0]["on_par"] == 1
    assert result.facts["verdicts"] == {place: 6}
    assert any(f"{place} 100%" in note for note in result.notes)
    # A judge that calls everything a tie does not contradict itself.
    assert result.rows[0]["consistent"] == (1 if place == "TIE" else 0)
    assert any("contradicts itself in 3 of 3 pairs" in note for note in result.notes) == (place != "TIE")


def test_an_endpoint_that_stalls_and_fails_is_asked_again(answered, bench):
    faults = ["stall", 500, "drop", b"<html>busy</html>", (429, {"Retry-After": "0.01"})]
    with ChatServer(faults, reply=longer_wins) as server:
        judge = endpoint(server, timeout=0.5, retries=5)
        result = judge_pairs(answered, judge, bench)
        assert row_of(result) == counts(win=2, lose=1, tie=1, same=1)
        assert len(server.requests) == 6 + len(faults)
    assert result.facts["retried"] == {
        "timeout": 1, "server error": 1, "no connection": 1, "unusable reply": 1, "rate limit": 1,
    }  # fmt: skip
    assert result.facts["failed"] == {}


def test_replies_without_a_verdict_are_asked_for_again_counted_and_not_scored(answered, bench):
    def reply(message):
        return "Both have their merits." if "longest of all" in message else longer_wins(message)

    judge = Judge(reply)
    result = judge_pairs(answered, judge, bench)
    assert row_of(result) == counts(win=2, tie=1, same=1, unparsed=1)
    assert (result.rows[0]["judged"], result.rows[0]["on_par"]) == (3, 1.0)
    assert result.facts["failed"] == {"unusable reply": 2}
    assert result.facts["asked_for_one_word"] == 2
    assert [m.endswith("Reply with one word: A, B or TIE.") for m in judge.messages].count(True) == 2
    (unparsed,) = (s for s in result.samples if s["result"] == "unparsed")
    assert len(unparsed["failures"]) == 2
    assert "Both have their merits" in unparsed["failures"][0]
    assert "1 of 4 pairs have no result" in result.unfinished


def test_a_reply_without_a_verdict_is_followed_by_the_one_word_question(answered, bench):
    """The same question again would bring the same reply, after a pause that grows."""
    with ChatServer(reply=lambda message: "I cannot say.") as server:
        judge = endpoint(server, retries=5, backoff=100.0)
        result = judge_pairs(answered, judge, bench)
        sent = Counter(body["messages"][0]["content"] for *_, body in server.requests)
    assert set(sent.values()) == {1}
    assert [m.endswith("Reply with one word: A, B or TIE.") for m in sent].count(True) == len(sent) / 2 == 6
    assert row_of(result) == counts(tie=1, same=1, unparsed=3)
    assert (result.facts["retried"], result.facts["failed"]) == ({}, {"unusable reply": 6})


def test_the_verdict_alone_will_do(answered, bench):
    def reply(message):
        return longer_wins(message).splitlines()[-1] if "Reply with one word" in message else "I cannot say."

    result = judge_pairs(answered, Judge(reply), bench)
    assert row_of(result) == counts(win=2, lose=1, tie=1, same=1)
    assert (result.facts["asked_for_one_word"], result.facts["failed"]) == (6, {})


def test_an_endpoint_that_never_works_is_given_up_and_made_good_later(answered, tmp_path, cache_path):
    with ChatServer([None, *[500] * 99], reply=longer_wins) as server, AnswerCache(cache_path) as cache:
        judge = endpoint(server, jobs=1, retries=0)
        result = judge_pairs(answered, judge, make_bench(tmp_path, cache), give_up_after=2)
        assert len(server.requests) == 3
        assert row_of(result) == counts(tie=1, same=1, failed=2, not_asked=1)
        assert "the last 2 requests failed" in result.facts["stopped"]
        server.script.clear()
        result = judge_pairs(answered, judge, make_bench(tmp_path, cache))
        assert row_of(result) == counts(win=2, lose=1, tie=1, same=1)
        assert (result.facts["asked"], result.facts["from_cache"], len(server.requests)) == (5, 1, 8)


def test_an_interrupted_run_repeats_no_request(answered, tmp_path, cache_path):
    asked = []

    def reply(message):
        asked.append(message)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return longer_wins(message)

    with AnswerCache(cache_path) as cache, pytest.raises(KeyboardInterrupt):
        judge_pairs(answered, Judge(reply), make_bench(tmp_path, cache))
    with AnswerCache(cache_path) as cache:
        kept = len(cache)
        assert 1 <= kept <= 3
        judge = Judge()
        result = judge_pairs(answered, judge, make_bench(tmp_path, cache))
        assert row_of(result) == counts(win=2, lose=1, tie=1, same=1)
        assert len(judge.messages) == 6 - kept
        again = judge_pairs(answered, Judge(script=[RequestFailed("timeout", "asked for nothing")]),
                            make_bench(tmp_path, cache))  # fmt: skip
        assert (again.rows, again.facts["asked"]) == (result.rows, 0)
        other = Judge()
        other.name = "another judge"
        judge_pairs(answered, other, make_bench(tmp_path, cache))
        assert len(other.messages) == 6


def test_a_wrong_key_is_one_error_and_verdicts_are_kept(answered, tmp_path, cache_path):
    with ChatServer([None, None, 401], reply=longer_wins) as server, AnswerCache(cache_path) as cache:
        with pytest.raises(ChatModelError, match="refuses the key"):
            judge_pairs(answered, endpoint(server, jobs=1), make_bench(tmp_path, cache))
        assert len(cache) == 2


def test_a_request_that_several_pairs_lead_to_is_asked_once(answered, bench):
    slots, full = answered.answers
    twin = Contestant(full.subject, "full")
    answered.answers[twin] = answered.answers[full]
    judge = Judge()
    result = judge_pairs(answered, judge, bench, pairs=[(slots, full), (slots, twin), (full, slots)])
    assert len(judge.messages) == 6
    assert [(r["win"], r["lose"]) for r in result.rows] == [(2, 1), (2, 1), (1, 2)]


def test_a_local_model_judges_greedily(answered, bench, make_base, byte_tokenizer, one_thread):
    model = make_base(vocab_size=320, max_position_embeddings=4096)
    judge = LocalModel(model, byte_tokenizer, "tiny", max_answer_tokens=4)
    result = judge_pairs(answered, judge, bench)
    assert row_of(result) == counts(tie=1, same=1, unparsed=3)  # noise is no verdict
    assert result.facts["judge"]["settings"]["max_answer_tokens"] == 4


def test_who_is_compared_with_whom(make_icae, make_base, byte_tokenizer):
    def make(name, **fields):
        return make_subject(make_icae, make_base, byte_tokenizer, name, **fields)

    subjects = [make("one"), make("two", seed=3), make("few", memory_size=2)]
    pairs = [(a.name, b.name) for a, b in default_pairs(contestants_of(subjects, ["slots", "full", "truncated"]))]
    assert pairs == [
        ("one: slots", "one: full text"), ("one: slots", "one: truncated text"), ("two: slots", "one: full text"),
        ("two: slots", "one: truncated text"), ("few: slots", "one: full text"), ("few: slots", "few: truncated text"),
        ("one: slots", "two: slots"), ("one: slots", "few: slots"),
    ]  # fmt: skip


def test_nobody_to_compare_with_is_an_error(answered, bench):
    del answered.answers[list(answered.answers)[1]]
    with pytest.raises(InvalidInputError, match="no pair of answers to compare"):
        judge_pairs(answered, Judge(), bench)
    answered.answers.clear()
    with pytest.raises(InvalidInputError, match="no pair of answers to compare"):
        judge_pairs(answered, Judge(), bench)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "A"),
        ("Because it is right.\n\nB", "B"),
        ("**TIE**", "TIE"),
        ("Reason.\nVerdict: tie.", "TIE"),
        ("The better answer is A.", "A"),
        ("Answer B", "B"),
        ("[[A]]", "A"),
        ("<think>\nA\n</think>\nB\n", "B"),
    ],
)
def test_verdicts_are_read(reply, verdict):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize("reply", ["", "A is better than B", "A or B", "B\nwith this reason", "AB", "C", "A/B"])
def test_what_is_no_verdict_is_refused(reply):
    with pytest.raises(ValueError, match="reply"):
        parse_verdict(reply)


@pytest.mark.parametrize("filler", [" ", "*", ":", "* ", "the ", "verdict ", "\u3000"])
@pytest.mark.parametrize("begin", ["", "verdict", "the final answer is", "a"])
def test_a_long_line_is_read_in_linear_time(begin, filler):
    """A million characters, over which an expression of two or three free parts would take hours."""
    with pytest.raises(ValueError, match="reply"):
        parse_verdict(begin + filler * 1_000_000 + "x")


def test_blanks_and_marks_around_a_verdict_are_free():
    assert parse_verdict("**Verdict**" + " " * 1_000_000 + ":\u3000*B*" + "." * 1_000_000) == "B"


def test_outcomes():
    table = {(a, b): outcome(a, b) for a in ("A", "B", "TIE") for b in ("A", "B", "TIE")}
    assert table.pop(("A", "B")) == "win"
    assert table.pop(("B", "A")) == "lose"
    assert set(table.values()) == {"tie"}


def test_an_empty_answer_is_shown_as_such():
    assert "Answer A: (empty)\n" in judge_request(QUESTIONS[0], "", "text")


def test_an_answer_that_is_cut_off_is_no_verdict(answered, bench):
    cut = completion("A because", finish_reason="length")
    with ChatServer([cut] * 99, reply=longer_wins) as server:
        result = judge_pairs(answered, endpoint(server), bench)
    assert row_of(result) == counts(tie=1, same=1, unparsed=3)
    assert result.facts["failed"] == {"answer cut off": 6}


def test_a_run_measures_references_and_pairs(make_icae, make_base, byte_tokenizer, one_thread, tmp_path, cache_path):
    subject = make_subject(make_icae, make_base, byte_tokenizer)
    run = Instructions(QUESTIONS, Counter({"not JSON": 2}), ("slots", "full"), 5)
    assert list(run.measurements()) == ["instructions"]
    run.judge = Judge()
    with AnswerCache(cache_path) as cache:
        results = [measure([subject], make_bench(tmp_path, cache)) for measure in run.measurements().values()]
        assert len(cache) == 2 * N + len(run.judge.messages)
    assert [r.name for r in results] == ["instructions", "instructions_judged"] == list(run.measurements())
    assert all(r.facts["bad_rows"] == {"not JSON": 2} and r.facts["questions"] == N for r in results)


def test_a_judge_as_options_name_it(monkeypatch):
    assert load_judge(None, None, None) is None
    monkeypatch.setenv("SOME_KEY", "secret")
    with ChatServer(reply=longer_wins) as server:
        judge = load_judge(server.url, "m", None, "SOME_KEY", '{"max_tokens": null, "seed": 1}')
        assert judge.settings == {"model": "m", "temperature": 0.0, "seed": 1}
    with ChatServer(["stall", 500]) as server:
        judge = load_judge(server.url, "m", None, timeout=0.2, retries=0)
        for cause in ("timeout", "server error"):
            with pytest.raises(RequestFailed) as failed:
                asyncio.run(ask_once(judge))
            assert (failed.value.cause, judge.retries) == (cause, {})
    for options, message in (
        (("http://localhost/v1", "m", "smollm2"), "two judges"),
        (("http://localhost/v1", None, None), "--judge-endpoint needs --judge-model"),
        ((None, "m", None), "give --judge-endpoint"),
        (("http://localhost/v1", "m", None, "NO_KEY"), "NO_KEY of the API key is not set"),
        (("http://localhost/v1", "m", None, "SOME_KEY", "[]"), "--judge-body is"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            load_judge(*options)
