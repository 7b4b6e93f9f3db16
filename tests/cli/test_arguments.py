"""Arguments of commands: stdin, the home folder, greedy decoding, and texts that are not UTF-8."""

import io
import json
from types import SimpleNamespace

import pytest

from icae_fast.cli.options import at_home
from icae_fast.store.memory_file import save_memory

TINY = ("--dtype", "float32", "--max-new-tokens", 4)


@pytest.fixture
def saved(tmp_path, monkeypatch, capsys, make_base, make_icae, make_tokenizer):
    """Options that name a tiny base model and its adapter; the memory `note.icae` is in the working directory."""
    monkeypatch.chdir(tmp_path)
    base, tokenizer = make_base(), make_tokenizer()
    for part in (base, tokenizer):
        part.save_pretrained("base")
    base.config._name_or_path = "base"
    icae = make_icae(base=base, tokenizer=tokenizer)
    icae.save_pretrained("adapter")
    save_memory("note.icae", icae.compress("w5 w6 w7 w8 w9 w10 w11")[0], icae)
    capsys.readouterr()
    return ("--model", "base", "--adapter", "adapter", *TINY)


@pytest.fixture
def stdin(monkeypatch):
    """`stdin(content)` puts bytes on stdin."""
    return lambda content: monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def test_a_memory_and_a_prompt_come_on_stdin(run, saved, stdin, tmp_path):
    expected = run("restore", "note.icae", *saved)
    assert (expected[0], expected[2]) == (0, "")
    stdin((tmp_path / "note.icae").read_bytes())
    assert run("restore", "-", *saved) == expected
    expected = run("ask", "note.icae", "w8 w9", *saved, "--json")
    stdin(b"w8 w9\n")
    assert run("ask", "note.icae", "-", *saved, "--json") == expected
    stdin((tmp_path / "note.icae").read_bytes())
    code, out, _ = run("ask", "-", "w8 w9", *saved, "--json")
    assert (code, json.loads(out)["answers"]) == (0, json.loads(expected[1])["answers"])


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["ask", "-", "-"], b"", "- names stdin more than once"),
        (["ask", "note.icae", "-", "-"], b"", "- names stdin more than once"),
        (["ask", "note.icae", "-"], b"a \xff b", "cannot read stdin as UTF-8 text"),
        (["restore", "-"], b"a text", "stdin.icae is truncated or not a safetensors file"),
        (["ask", "note.icae", "a \udcff b"], b"", r"'a \udcff b' is not UTF-8"),
        (["ask", "note.icae", "w5", "--stop", "\udcff"], b"", r"'\udcff' is not UTF-8"),
        (["compress", "nothere.txt"], b"", "there is no file nothere.txt; check the path"),
        (["compress", "base"], b"", "base is a folder, not a text"),
        (["bench", "latency", "nothere.txt"], b"", "there is no file nothere.txt; check the path"),
    ],
)
def test_a_mistake_is_one_line(run, saved, stdin, arguments, content, message):
    stdin(content)
    code, out, err = run(*arguments, *(saved[:6] if arguments[0] != "bench" else ()))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line


def test_a_temperature_of_0_is_greedy(run, saved):
    greedy = run("ask", "note.icae", "w8", *saved)
    assert greedy[0] == 0
    for more in ([], ["--seed", 3], ["--top-p", 0.5]):
        assert run("ask", "note.icae", "w8", *saved, "--temperature", 0, *more) == greedy


def test_the_home_folder_in_options(run, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = run("restore", "note.icae", *saved)
    home = ("--model", "~/base", "--adapter", "~/adapter", *TINY)
    assert run("restore", "~/note.icae", *home) == expected
    assert at_home(["~/a", "b~"]) == [str(tmp_path / "a"), "b~"]
    assert not (tmp_path / "~").exists()
