"""How commands end: exit codes, one line for a mistake, and silence for a closed pipe or Ctrl-C."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest
import typer

from icae_fast.cli import app, ending
from icae_fast.errors import StoreError


def failing(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StoreError("the index\n of [/x]   is damaged"), 2, "icae-fast: error: the index of [/x] is damaged\n"),
        (StoreError("give do_sample=True"), 2, "icae-fast: error: give --temperature True\n"),
        (typer.BadParameter("no"), 2, "icae-fast: error: Invalid value: no (try --help)\n"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
            2,
            f"icae-fast: error: cannot read or write {'x' * 300} (File name too long); check the path, its permissions "
            "and the space on the disk\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 130, ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
)
def test_exit_codes(capsys, error, code, line):
    assert ending.exit_code_of(failing(error), "ask") == code
    assert capsys.readouterr() == ("", line)


def test_a_fault_of_the_program_keeps_its_traceback():
    for error in (AssertionError("x"), OSError("not from the system")):
        with pytest.raises(type(error)):
            ending.exit_code_of(failing(error), "ask")


def test_characters_that_the_output_lacks_are_replaced(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    assert ending.exit_code_of(lambda: print("café \udcff"), "restore") == 0
    assert buffer.getvalue() == b"caf? ?\n"


def environment(**variables):
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | variables


@pytest.mark.parametrize("arguments", [["info"], ["make-pwc", "--help"], ["info", "--json"], ["--version"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_quiet(arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "icae_fast.cli", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True,
        check=False, env=environment(PYTHONUNBUFFERED=unbuffered),
    )  # fmt: skip
    os.close(writer)
    assert (ended.returncode in (1, 141), ended.stderr) == (True, "")


def test_a_full_disk_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "icae_fast.cli", "--version"], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "icae-fast: error: cannot read or write the output (No space left on device); check the path, its permissions "
        "and the space on the disk"
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a child process")
def test_ctrl_c_is_quiet():
    """The command waits for a memory on stdin."""
    with subprocess.Popen(
        [sys.executable, "-m", "icae_fast.cli", "restore", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        chunk = "x" * 65536
        for _ in range(8):  # more than a pipe takes in: the command has begun to read
            process.stdin.write(chunk)
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err.strip()) == (130, "", "")


def test_h_is_help_everywhere(run):
    for arguments in ([], ["bench"], ["bench", "latency"], *([name] for name in app.COMMANDS)):
        code, out, err = run(*arguments, "-h")
        assert (code, err) == (0, "")
        assert out == run(*arguments, "--help")[1]
        assert "Usage:" in out
