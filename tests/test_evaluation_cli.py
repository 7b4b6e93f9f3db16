"""`icae-fast eval` as a user runs it."""

import json

import pytest

import golden
from evaluation_helpers import golden_icae, words
from icae_fast import cli
from training.evaluation.subject import SubjectSpec, load_subjects

pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
pytest.importorskip("matplotlib", reason="plots need matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folders(tmp_path, make_tokenizer):
    """The golden base and adapter, and a text, in a folder."""
    model, tokenizer = golden.load_base(), make_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    golden_icae(tokenizer).save_pretrained(tmp_path / "adapter")
    (tmp_path / "text.txt").write_text(words(700, 1))
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "speed"), "no measurement 'speed'; choose among restoration, content"),
        (("--only", ","), "nothing is to be measured"),
        (("--adapter", "a=x", "--adapter", "a=y"), "two adapters are called a"),
        (("--adapter", "a="), "NAME=PATH@MODEL"),
        (("--adapter", "/nowhere/adapter"), "/nowhere/adapter is neither a folder"),
        (("--samples", 0), "--samples"),
        (("--dtype", "int4", "--model", "/nowhere"), "--dtype is 'int4'"),
        (("-o", "/nowhere/out"), "cannot make the folder /nowhere/out"),
    ],
)
def test_a_mistake_is_one_line(run, folders, options, message):
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

    monkeypatch.setattr("training.evaluation.run.evaluate", interrupt)
    monkeypatch.setattr(cli, "load", lambda *arguments: golden_icae(None))
    monkeypatch.setattr("training.evaluation.subject.Subject", lambda name, icae: icae)
    code, _, err = run("eval", folders / "text.txt", "-o", folders / "out")
    assert code == 130
    assert "run the same command again to go on" in err
