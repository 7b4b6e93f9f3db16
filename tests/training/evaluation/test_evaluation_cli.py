"""`icae-fast eval` on the command line."""

import itertools
import json
import signal

import pytest

from helpers import golden
from helpers.chat import ChatServer
from helpers.evaluation import golden_icae, words
from helpers.instructions import longer_wins
from icae_fast.errors import InvalidInputError
from icae_fast.training.evaluation.cache import AnswerCache
from icae_fast.training.evaluation.evaluate import GROUPS, choose_groups
from icae_fast.training.evaluation.subject import SubjectSpec, load_subjects

pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
pytest.importorskip("matplotlib", reason="plots need matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folders(tmp_path, make_tokenizer):
    """Return a folder with the golden base and adapter, and a text."""
    model, tokenizer = golden.load_base(), make_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    golden_icae(tokenizer).save_pretrained(tmp_path / "adapter")
    (tmp_path / "text.txt").write_text(words(700, 1))
    rows = [
        {"input": words(40, i // 2), "prompt": words(4, 50 + i), "answer": words(3, 90 + i), "kind": kind}
        for i, kind in enumerate(["question", "title"] * 2)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_two_adapters_side_by_side_and_a_second_run(run, folders):
    adapters = [x for name in ("a", "b") for x in ("--adapter", f"{name}={folders}/adapter@{folders}/base")]
    arguments = ("eval", folders / "text.txt", *adapters, "-o", folders / "out", "--only", "content,several_spans",
                 "--samples", 2, "--dtype", "float32")  # fmt: skip
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    printed = json.loads(out)
    assert [r["name"] for r in printed["results"]] == ["restoration_by_content", "several_spans"]
    assert {row["subject"] for row in printed["results"][0]["rows"]} == {"a", "b"}
    files = {p.name: p.read_bytes() for p in (folders / "out").iterdir() if p.suffix != ".lock"}
    assert {"summary.md", "several_spans.png", "restoration_by_content.json", "answers.jsonl"} <= set(files)
    code, out, _ = run(*arguments)
    assert code == 0
    assert "Several spans" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "…" not in out  # no cell is cut off
    assert files == {p.name: p.read_bytes() for p in (folders / "out").iterdir() if p.suffix != ".lock"}


def test_adapters_on_one_base_model_share_it(folders):
    first, second = load_subjects(
        [SubjectSpec(name, str(folders / "adapter"), str(folders / "base")) for name in "ab"], None, "float32"
    )
    assert first.icae.base_model is second.icae.base_model
    assert first.origin == second.origin


def test_what_is_too_short_is_told_and_exits_with_one(run, folders):
    (folders / "short.txt").write_text(words(50, 1))
    code, out, err = run(
        "eval", folders / "short.txt", "--adapter", folders / "adapter", "--model", folders / "base", "-o",
        folders / "out", "--only", "continuation,content", "--samples", 2,
    )  # fmt: skip
    assert code == 1
    assert "not measured: table_6: adapter: none of the texts has 640 tokens in a row" in err
    assert "Restoration by content" in out
    assert "## Not measured" in (folders / "out" / "summary.md").read_text()


def instruction_arguments(folders, *more):
    return (
        "eval", "--pwc", folders / "rows.jsonl", "--adapter", f"mine={folders}/adapter@{folders}/base", "-o",
        folders / "out", "--max-new-tokens", 8, "--dtype", "float32", *more,
    )  # fmt: skip


def messages(server):
    return [body["messages"][0]["content"] for *_, body in server.requests]


@pytest.fixture
def heeds_ctrl_c():
    """Restore the SIGINT handler, which is ignored if a shell runs the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_judged_prompts_interrupted_taken_up_and_made_again(run, folders, monkeypatch):
    put, puts = AnswerCache.put, itertools.count()

    def put_and_interrupt(*arguments):
        put(*arguments)
        if next(puts) == 4 * 4 + 2 + 5:  # answers, summaries of two texts, and verdicts
            signal.raise_signal(signal.SIGINT)

    with ChatServer(reply=longer_wins) as server:
        arguments = instruction_arguments(folders, "--judge-endpoint", server.url, "--judge-model", "m")
        with monkeypatch.context() as patch:
            patch.setattr(AnswerCache, "put", put_and_interrupt)
            code, _, err = run(*arguments)
        assert code == 130
        assert "run the same command again to go on" in err
        assert (folders / "out" / "instructions.json").exists()
        assert not (folders / "out" / "instructions_judged.json").exists()
        asked = len(server.requests)

        code, out, _ = run(*arguments, "--json")
        assert code == 0
        results = {r["name"]: r for r in json.loads(out)["results"]}
        facts = results["instructions_judged"]["facts"]
        assert facts["from_cache"] > 5
        assert len(server.requests) == asked + facts["asked"]
        assert len(set(messages(server)[asked:])) == facts["asked"]
        assert {row["kind"] for row in results["instructions"]["rows"]} == {"all", "question", "title"}
        assert [row["opponent"] for row in results["instructions_judged"]["rows"]] == [
            "mine: full text", "mine: truncated text", "mine: summary",
        ]  # fmt: skip
        assert all(row["judged"] == 4 for row in results["instructions_judged"]["rows"])

        asked, kept = len(server.requests), (folders / "out" / "answers.jsonl").read_bytes()
        monkeypatch.setattr(AnswerCache, "put", None)  # nothing is computed
        code, out, err = run(*arguments)
        assert code == 0
        assert len(server.requests) == asked
        assert (folders / "out" / "answers.jsonl").read_bytes() == kept
    assert "judged by m" in out
    assert "left out: restoration: it is measured on texts, and none are given" in err
    summary = (folders / "out" / "summary.md").read_text()
    assert "![Instructions: pairs of answers, judged by m](instructions_judged.png)" in summary
    assert "* several_spans: it is measured on texts" in summary


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([404] * 9, "not measured: instructions_judged: "),
        ([None] + [400] * 99, "not finished: instructions_judged: "),
    ],
)
def test_a_judge_that_fails_costs_its_own_figures_alone(run, folders, script, message):
    with ChatServer(script, reply=longer_wins) as server:
        judge = ("--judge-endpoint", server.url, "--judge-model", "m", "--judge-jobs", 1)
        code, out, err = run(*instruction_arguments(folders, "--contestants", "slots,full", *judge))
    assert code == 1
    assert message in err
    assert "answers against references" in out
    assert "Not measured" in (folders / "out" / "summary.md").read_text()


def test_without_a_judge_pairs_are_left_out(run, folders):
    code, out, _ = run(*instruction_arguments(folders, "--samples", 2, "--json"))
    assert code == 0
    assert "no judge is given" in json.loads(out)["left_out"]["instructions_judged"]
    assert json.loads(out)["results"][0]["rows"][0]["answers"] == 2


def test_an_adapter_of_the_package_goes_by_its_name(run, folders, monkeypatch):
    (folders / "adapters").mkdir()
    (folders / "adapter").rename(folders / "adapters" / "smollm2-135m")
    monkeypatch.setattr("icae_fast.io.hub.ADAPTERS", folders / "adapters")
    code, out, _ = run(
        "eval", folders / "text.txt", "--adapter", "smollm2-135m", "--model", folders / "base", "-o", folders / "out",
        "--only", "content", "--samples", 1, "--json",
    )  # fmt: skip
    assert code == 0
    assert {row["subject"] for row in json.loads(out)["results"][0]["rows"]} == {"smollm2-135m"}


def test_what_is_measured_goes_by_what_is_given():
    assert choose_groups(None, True, True).groups == list(GROUPS)
    choice = choose_groups(None, True, False)
    assert choice.groups == ["restoration", "content", "continuation", "several_spans"]
    assert choice.left_out == {"instructions": "it is measured on prompts, and no --pwc is given"}
    assert list(choose_groups("content", True, True).of_texts) == ["restoration_by_content"]
    with pytest.raises(InvalidInputError, match="content cannot be measured: it is measured on texts"):
        choose_groups("instructions,content", False, True)
    with pytest.raises(InvalidInputError, match="give texts, or rows of prompts with --pwc"):
        choose_groups(None, False, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "speed"), "no measurement 'speed'; choose among restoration, content"),
        (("--only", ","), "there is nothing to measure"),
        (("--adapter", "a=x", "--adapter", "a=y"), "two adapters are called a"),
        (("--adapter", "a="), "NAME=PATH@MODEL"),
        (("--adapter", "/nowhere/adapter"), "/nowhere/adapter is neither a folder"),
        (("--samples", 0), "--samples"),
        (("--dtype", "int4", "--model", "/nowhere"), "--dtype is 'int4'"),
        (("-o", "/nowhere/out"), "cannot make the folder /nowhere/out"),
        (("--only", "instructions"), "instructions cannot be measured: it is measured on prompts, and no --pwc"),
        (("--judge-local", "smollm2"), "give rows of them with --pwc"),
        (("--pwc", "rows.jsonl", "--judge-model", "m"), "give --judge-endpoint"),
        (("--pwc", "rows.jsonl", "--contestants", "mirror"), "mirror cannot be read by contestants"),
        (("--pwc", "absent.jsonl"), "there is no absent.jsonl"),
        (
            (
                "--pwc",
                "rows.jsonl",
                "--contestants",
                "slots",
                "--judge-endpoint",
                "http://localhost/v1",
                "--judge-model",
                "m",
                "--adapter",
                "adapter@base",
            ),
            "a judge compares two answers",
        ),
    ],
)
def test_a_mistake_is_one_line(run, folders, monkeypatch, options, message):
    monkeypatch.chdir(folders)
    code, out, err = run("eval", folders / "text.txt", "-o", folders / "out", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(folders.glob("out/*"))


def test_texts_that_are_not_there(run, tmp_path):
    code, _, err = run("eval", tmp_path / "absent.txt", "-o", tmp_path / "out")
    assert code == 2
    assert "there is no" in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(run, folders, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("icae_fast.training.evaluation.evaluate.evaluate", interrupt)
    monkeypatch.setattr("icae_fast.cli.commands.evaluate.load", lambda *arguments: golden_icae(None))
    monkeypatch.setattr("icae_fast.training.evaluation.subject.Subject", lambda name, icae: icae)
    code, _, err = run("eval", folders / "text.txt", "-o", folders / "out")
    assert code == 130
    assert "run the same command again to go on" in err
