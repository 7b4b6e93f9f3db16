"""What commands print: data as it is, folded on a terminal, and whole lines in a pipe."""

import ast
import io
from pathlib import Path

import pytest
from rich.table import Table

import icae_fast
from icae_fast.cli.output import print_memories, print_table, stderr, token_progress
from icae_fast.io.console import printable

NAMES = ["[/x]", "[draft].txt", ":smile:", "[red]a[/red]", "\\[b]", "notes/" + "a" * 94 + ".txt.icae"]
ROOT = Path(icae_fast.__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def memory_rows(names):
    return [{"memory": name, "tokens": 9, "spans": [9], "slots": 4, "ratio": 2.25, "bytes": 2048} for name in names]


def test_a_pipe_gets_whole_lines_with_tabs(capsys):
    print_memories("memory file", memory_rows(NAMES), as_json=False)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["memory file", "tokens", "spans", "slots", "ratio", "KiB"]
    assert lines[1:] == [[name, "9", "1", "4", "2.25", "2"] for name in NAMES]


def test_a_line_end_or_an_escape_in_a_name_is_written_out(capsys):
    print_memories("key", memory_rows(["a\nb\tc\x1b[31m\x9b"]), as_json=False)
    assert capsys.readouterr().out.splitlines()[1].split("\t")[0] == r"a\nb\tc\x1b[31m\x9b"
    assert printable("日本 [/x] é\u00a0") == "日本 [/x] é\u00a0"


def test_a_terminal_folds_names_and_drops_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    print_memories("memory file", memory_rows([*NAMES, "\x1b[2J"]), as_json=False)
    shown = terminal.getvalue()
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    cells = [row.split("│")[1] for row in rows]
    assert "".join(cell.strip() for cell in cells) == "".join(NAMES) + r"\x1b[2J"
    assert "…" not in shown
    assert max(map(len, rows)) <= 60


def test_title_and_caption_stand_around_the_lines(capsys):
    table = Table("a\nb", "", title="[t]", caption=":x:")
    table.add_row("1", "2")
    print_table(table)
    assert capsys.readouterr().out == "[t]\na b\t\n1\t2\n:x:\n"


def test_messages_and_progress_take_no_markup(capsys, monkeypatch):
    stderr.print("cannot read [/x] and :smile: of [bold]\x1b[31m", style="red")
    assert capsys.readouterr().err == "cannot read [/x] and :smile: of [bold]\\x1b[31m\n"
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with token_progress("[/x] :smile:") as on_progress:
        on_progress(1, 2)


def test_no_other_place_prints_with_markup():
    """Rich takes strings for markup unless it is told otherwise, so all consoles and columns are of `io.console`."""
    files = [path.resolve() for folder in ("icae_fast", "training") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    makers = {"Console", "TextColumn", "Progress", "Panel"}
    strays = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        if path.name != "console.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in makers
    ]
    assert not strays


@pytest.mark.parametrize("name", ["[/x]", "[draft].txt", ":smile:"])
def test_an_error_names_the_file_as_it_is(run, name):
    code, out, err = run("restore", name)
    assert (code, out) == (2, "")
    assert f"there is no file {name};" in err
