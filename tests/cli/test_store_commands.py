"""Commands on stores: files are compressed as batches are done, bad ones are named, damaged entries stop nothing."""

import io
import json
from types import SimpleNamespace

import pytest

from helpers.store import make_origin, memory_for
from icae_fast import MemoryStore
from icae_fast.store import compressing
from icae_fast.store.memory_file import read_memory_header

TEXT = "the cat sat on the mat "


@pytest.fixture
def tiny(make_base, make_icae, byte_tokenizer, monkeypatch):
    """Make every command load a tiny model with a byte tokenizer; two texts of ten words are a batch of theirs."""
    from icae_fast.backbone import rows

    icae = make_icae(base=make_base(vocab_size=320), tokenizer=byte_tokenizer)
    monkeypatch.setattr("icae_fast.cli.commands.compress.load", lambda *_: icae)
    monkeypatch.setattr(rows, "token_budget_on", lambda device, budget: budget or 16)
    monkeypatch.setattr("icae_fast.core.compress.token_budget_on", lambda device, budget: budget or 16)
    return icae


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Five texts, two of them bad: a.txt, b.txt (empty), c.txt, d.txt (no UTF-8), e.txt, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abcde"):
        (tmp_path / f"{name}.txt").write_text(TEXT * (i + 1))
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "d.txt").write_bytes(b"\xff\x9f")
    return [f"{name}.txt" for name in "abcde"]


def lines_of(err):
    return [line for line in err.splitlines() if "error" in line]


@pytest.mark.usefixtures("tiny")
def test_bad_files_are_named_and_stop_no_other(run, files, tmp_path):
    code, out, err = run("compress", *files, "--store", "store")
    assert code == 1
    assert len(lines_of(err)) == 2
    assert "b.txt is empty" in lines_of(err)[0]
    assert "d.txt" in lines_of(err)[1]
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0][:2] == ["file", "key"]
    assert [row[0] for row in rows[1:]] == ["a.txt", "c.txt", "e.txt"]
    with MemoryStore("store") as store:
        assert sorted(row[1] for row in rows[1:]) == list(store)
    code, out, err = run("compress", *files, "--json")
    assert code == 1
    assert len(lines_of(err)) == 2
    assert [(row["file"], row["memory"]) for row in json.loads(out)] == [(f"{n}.txt", f"{n}.txt.icae") for n in "ace"]
    assert all(read_memory_header(row["memory"])[0].n_slots == row["slots"] for row in json.loads(out))
    code, out, err = run("compress", "b.txt", "d.txt", "absent.txt", "--store", "store")
    assert (code, out, len(lines_of(err))) == (1, "", 3)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("arguments", [[], ["--store", "store"]])
def test_what_was_compressed_before_an_end_is_kept_and_said(run, files, tmp_path, monkeypatch, arguments):
    compress, calls = compressing.compress_cut, []

    def fail_later(core, cuts, **options):
        calls.append(len(cuts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compress(core, cuts, **options)

    monkeypatch.setattr(compressing, "compress_cut", fail_later)
    code, out, _ = run("compress", "a.txt", "c.txt", "e.txt", *arguments, "--json")
    assert code == 130
    assert [row["file"] for row in json.loads(out)] == ["a.txt", "c.txt"]
    if arguments:
        with MemoryStore("store") as store:
            assert sorted(row["memory"] for row in json.loads(out)) == list(store)
    else:
        assert sorted(p.name for p in tmp_path.glob("*.icae")) == ["a.txt.icae", "c.txt.icae"]


@pytest.mark.usefixtures("tiny", "files")
def test_a_text_on_stdin(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    code, out, _ = run("compress", "-", "--json")
    assert (code, json.loads(out)[0]["file"], json.loads(out)[0]["memory"]) == (0, "stdin", "stdin.icae")
    assert (tmp_path / "stdin.icae").is_file()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    code, out, _ = run("compress", "-", "a.txt", "--store", "store", "--json")
    assert code == 0
    assert [row["file"] for row in json.loads(out)] == ["stdin", "a.txt"]
    assert json.loads(out)[0]["memory"] == json.loads(out)[1]["memory"]
    code, _, err = run("compress", "-", "-", "--store", "store")
    assert (code, "more than once" in err) == (2, True)


@pytest.fixture
def damaged(tmp_path):
    """A store of a, b and c, of which b is cut off."""
    with MemoryStore(tmp_path / "store", make_origin()) as store:
        for key in ("a", "[b/x]", "c"):
            store.put(key, memory_for(key))
        path = store._folder.root / store._folder.index.file_of("[b/x]")
    path.write_bytes(path.read_bytes()[:-1])
    return tmp_path / "store"


def test_list_reads_headers_and_names_damaged_entries(run, damaged, monkeypatch):
    monkeypatch.setattr("icae_fast.store.seal.Sealed.tensor", None)  # no tensor is read
    code, out, err = run("list", damaged, "--json")
    assert code == 1
    memory = memory_for("a")
    expected = {"tokens": 20, "spans": [10, 10], "slots": 8, "ratio": 2.5, "bytes": memory.nbytes}
    assert json.loads(out) == [{"memory": key} | expected for key in "ac"]
    assert len(lines_of(err)) == 1
    assert "entry '[b/x]'" in err


def test_delete_rebuild_and_clean(run, damaged, tmp_path, monkeypatch):
    code, out, err = run("delete", damaged, "[b/x]", "absent", "a")
    assert (code, out) == (1, "")
    assert "no entry 'absent'; see `icae-fast list`" in err
    assert run("delete", damaged, "absent")[0] == 2
    with MemoryStore(damaged) as store:
        assert list(store) == ["c"]
        (path,) = damaged.glob("??/*.safetensors")
    (damaged / "index.sqlite").write_bytes(b"damage" * 1000)
    code, _, err = run("list", damaged)
    assert code == 2
    assert "`icae-fast rebuild STORE`" in err
    waste = path.with_name(path.name[:33] + "0" * 16 + ".safetensors")
    waste.write_bytes(path.read_bytes()[:100])
    code, out, err = run("rebuild", damaged)
    assert (code, out) == (1, "1 entries\n")
    assert waste.name in err
    assert run("clean", damaged)[:2] == (0, "0 files deleted\n")
    assert run("clean", damaged, "--older-than", 0)[:2] == (0, "1 files deleted\n")
    assert run("rebuild", damaged)[:2] == (0, "1 entries\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "c" in run("list", "~/store")[1]
    for command in ("delete", "list", "rebuild", "clean"):
        assert run(command, tmp_path / "nowhere", *(["k"] if command == "delete" else []))[0] == 2
    assert not (tmp_path / "nowhere").exists()


def test_every_command_that_a_message_advises_exists():
    from icae_fast.cli.app import COMMANDS
    from icae_fast.cli.messages import for_command_line

    text = for_command_line("make it again from the entries with MemoryStore.rebuild(path); see its keys()", "list")
    advised = [word.split()[1] for word in text.split("`") if word.startswith("icae-fast ")]
    assert advised == ["rebuild", "list"]
    assert set(advised) <= COMMANDS.keys()
