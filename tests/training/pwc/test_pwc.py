"""make-pwc with a scripted teacher: the records, and recovery from faults and kills."""

import json
import resource

import pytest

from helpers.chat import PARAGRAPHS, ScriptedTeacher
from icae_fast.errors import ChatModelError, InvalidInputError, OutputError
from icae_fast.training.chat.model import RequestFailed
from icae_fast.training.pwc import RecordFile, Settings, make_pwc
from icae_fast.training.pwc.passages import count_words
from icae_fast.training.pwc.prompts import KINDS, parse_questions

LIMITS = {"max_tokens": 30, "min_tokens": 5}


@pytest.fixture
def make(tmp_path):
    """Return `make(teacher, **settings)`, which runs over five paragraphs and returns (report, failures)."""
    (tmp_path / "text.txt").write_text("\n\n".join(PARAGRAPHS))

    def call(teacher, **settings):
        failures = []
        with RecordFile(tmp_path / "out.jsonl") as records:
            paths = [tmp_path / "text.txt"]
            report = make_pwc(paths, records, teacher, Settings(**LIMITS | settings), on_failure=failures.append)
        return report, failures

    return call


def read(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def check_shape(rows):
    for row in rows:
        assert all(isinstance(row[field], str) and row[field].strip() for field in ("input", "prompt", "answer"))
        assert row["input"] in PARAGRAPHS
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("at_once", [False, True])
def test_every_passage_gets_all_kinds_and_its_questions(make, tmp_path, at_once):
    report, failures = make(ScriptedTeacher(), questions=3, at_once=at_once)
    assert not failures
    assert report.written == dict.fromkeys(KINDS, 5) | {"question": 15}
    rows = read(tmp_path)
    check_shape(rows)
    assert len(rows) == 45
    for row in rows:
        number = row["input"].split()[1]
        assert row["origin"] == f"{tmp_path / 'text.txt'}#{number}"
        if row["kind"] == "question":
            assert row["prompt"].startswith(f"Question {number}.")
        else:
            assert row["prompt"] in KINDS[row["kind"]]
        if row["kind"] == "restate":
            assert (row["answer"], row["teacher"]) == (row["input"], "text")
        elif row["kind"] == "continue" and number != "5":
            assert (row["answer"], row["teacher"]) == (PARAGRAPHS[int(number)], "text")
        elif row["kind"] != "question":
            assert (row["answer"], row["teacher"]) == (f"An answer about paragraph {number}.", "scripted")


def test_a_second_run_asks_nothing_and_a_larger_one_only_what_is_new(make, tmp_path):
    make(ScriptedTeacher(), kinds=("title",), questions=2)
    before = (tmp_path / "out.jsonl").read_bytes()
    teacher = ScriptedTeacher()
    report, _ = make(teacher, kinds=("title",), questions=2)
    assert (teacher.messages, report.resumed, report.written.total()) == ([], 15, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    report, _ = make(teacher, kinds=("title", "summary"), questions=3)
    assert report.written == {"summary": 5, "question": 5}
    lists = [m for m in teacher.messages if "numbered list" in m]
    assert len(lists) == 5
    assert all("Write 1 questions" in m and m.count("- Question ") == 2 for m in lists)
    check_shape(read(tmp_path))


def test_without_a_teacher_only_what_the_text_answers(make, tmp_path):
    report, _ = make(None, kinds=("restate", "continue"), questions=0)
    assert report.written == {"restate": 5, "continue": 4}
    assert make(None, kinds=("restate", "continue"), questions=0)[0].resumed == 9
    with pytest.raises(InvalidInputError, match="need a teacher"):
        make(None, kinds=("title",), questions=0)


def test_failures_are_counted_named_and_made_good_by_the_next_run(make, tmp_path):
    failed = RequestFailed("timeout", "no reply within 1 s")
    report, failures = make(ScriptedTeacher([failed, None, "?!"]), kinds=("title",), questions=3)
    # Of the passages' titles and lists of questions, the first failed and one could not be read.
    assert report.failed["timeout"] == 1
    assert report.failed.total() == len(failures) + (2 if "unusable reply" in report.failed else 0)
    assert any("#1: title: timeout: no reply within 1 s" in f for f in failures)
    missing = report.failed.total()
    assert report.written.total() == 20 - missing
    report, failures = make(ScriptedTeacher(), kinds=("title",), questions=3)
    assert (report.written.total(), report.resumed, failures) == (missing, 20 - missing, [])
    check_shape(read(tmp_path))


@pytest.mark.parametrize("at_once", [False, True])
def test_too_few_questions_are_a_failure(make, at_once):
    report, failures = make(ScriptedTeacher(questions=2), kinds=(), questions=3, at_once=at_once)
    assert (report.written, report.failed) == ({"question": 10}, {"too few questions": 5})
    assert len(failures) == 5


def test_it_stops_when_nothing_works_but_not_for_what_lies_in_the_texts(make):
    failing = [RequestFailed("server error", "500")] * 100
    report, failures = make(ScriptedTeacher(failing), kinds=("title", "summary"), questions=0, give_up_after=4)
    assert "the last 4 requests failed" in report.stopped
    assert 4 <= len(failures) < 10
    failing = [RequestFailed("answer cut off", "no end", of_message=True)] * 100
    report, failures = make(ScriptedTeacher(failing), kinds=("title", "summary"), questions=0, give_up_after=4)
    assert (report.stopped, report.failed) == (None, {"answer cut off": 10})


def test_an_error_of_the_teacher_ends_the_run_and_keeps_what_is_there(make, tmp_path):
    with pytest.raises(ChatModelError, match="401"):
        make(ScriptedTeacher([None, None, None, ChatModelError("401")]), kinds=("title",), questions=0)
    check_shape(kept := read(tmp_path))
    assert 2 <= len(kept) <= 4  # of five, one of which failed; the other worker's may have been under way
    assert make(ScriptedTeacher(), kinds=("title",), questions=0)[0].written == {"title": 5 - len(kept)}


def test_passages_that_are_too_short_or_come_twice_are_counted(make, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join([*PARAGRAPHS, PARAGRAPHS[0], "The end."]))
    longest = count_words(PARAGRAPHS[0])  # so that the last two make no passage together
    report, _ = make(None, kinds=("restate",), questions=0, max_tokens=longest)
    assert report.skipped == {"seen before": 1, "too short": 1}
    assert report.written == {"restate": 5}
    (tmp_path / "text.txt").write_text("The end.")
    with pytest.raises(InvalidInputError, match="no passage of at least 5"):
        make(None, kinds=("restate",), questions=0)


def test_progress_reaches_its_total(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(PARAGRAPHS))
    seen = []
    with RecordFile(tmp_path / "out.jsonl") as records:
        failing = ScriptedTeacher([RequestFailed("timeout", "late")])
        settings = Settings(**LIMITS, questions=2)
        make_pwc([tmp_path], records, failing, settings, on_progress=lambda *counts: seen.append(counts))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (40, 40)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kinds": ("title", "poem")}, "no kind of prompt 'poem'"),
        ({"kinds": (), "questions": 0}, "nothing is asked"),
        ({"questions": -1}, "nothing is asked"),
        ({"min_tokens": 9, "max_tokens": 8}, "cannot be cut"),
        ({"min_tokens": 0, "max_tokens": 0}, "cannot be cut"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InvalidInputError, match=message):
        Settings(**fields)


def record(n):
    names = ("input", "prompt", "answer", "kind", "origin", "teacher")
    return {"id": f"{n:016x}-title"} | {name: f"{name} {n} é" for name in names}


def test_a_file_cut_off_at_any_byte_is_taken_up(tmp_path):
    path = tmp_path / "out.jsonl"
    with RecordFile(path) as records:
        for n in range(2):
            records.append(record(n))
    whole = path.read_bytes()
    end = whole.index(b"\n") + 1
    for size in range(end, len(whole) + 1):
        path.write_bytes(whole[:size])
        with RecordFile(path) as records:
            # Only the newline missing, the last record is whole, too.
            assert len(records.ids) == (2 if size >= len(whole) - 1 else 1)
            assert records.cut == (0 if size >= len(whole) - 1 else size - end)
            if len(records.ids) == 1:
                records.append(record(1))
        assert path.read_bytes() == whole
    assert whole[:5] == b'{"id"'


@pytest.mark.parametrize("content", ["precious text", '{"text": "a"}\n', '{"id": "x", "input": 3}\n', "\n", "[" * 9999])
def test_a_foreign_file_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=r"out\.jsonl:1 is not a record"):
        RecordFile(path).__enter__()
    assert path.read_text() == content


def test_a_full_disk_leaves_whole_records(tmp_path):
    path = tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RecordFile(path) as records:
        records.append(record(0))
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + size // 2, hard))
        try:
            records.append(record(1))
            with pytest.raises(OutputError, match="lines are complete"):
                records.append(record(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.stat().st_size == 2 * size
        records.append(record(2))
    with RecordFile(path) as records:
        assert len(records.ids) == 3


def test_an_output_that_cannot_be_written_is_one_error(tmp_path):
    for path, message in (
        (tmp_path / "absent" / "out.jsonl", "create it first"),
        (tmp_path, "not a regular file"),
        (tmp_path / ("n" * 256), "cannot write"),  # the name is too long
    ):
        with pytest.raises(OutputError, match=message):
            RecordFile(path).__enter__()
    with RecordFile(tmp_path / "out.jsonl"), pytest.raises(OutputError, match="another process"):
        RecordFile(tmp_path / "out.jsonl").__enter__()
    assert not list(tmp_path.glob("*.jsonl"))  # none was written


@pytest.mark.parametrize("filler", [" ", "\t", "*", "* ", "1", "Q ", "Q1 ", "- ", "(", "[", '{"a":'])
def test_a_long_line_is_read_in_linear_time(filler):
    """A million characters, over which an expression of two free parts would take hours."""
    line = filler * 1_000_000
    with pytest.raises(ValueError, match="reply"):
        parse_questions(f"{line}\n1{line}\nx{line}")
    assert parse_questions(f"{line}\n  1. What is it?\n   Q2:  And then?") == ["What is it?", "And then?"]
