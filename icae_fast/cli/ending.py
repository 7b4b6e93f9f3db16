"""How a command ends: its exit code, and one line on stderr for a mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from icae_fast.cli.messages import for_command_line
from icae_fast.cli.output import stderr
from icae_fast.errors import ICAEError

# Typer vendors its own click; this is the only public way to its base class of usage errors.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

MISTAKE, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # the last two as a shell reports SIGINT and SIGPIPE


def exit_code_of(call: Callable[[], Any], command: str) -> int:
    """Call a command and return its exit code; a user's mistake is printed as one line on stderr.

    Args:
        call: runs the command and returns its exit code, or None for 0.
        command: name of the command, for the words of the message.
    """
    _replace_unprintable()
    try:
        code = call()
        sys.stdout.flush()  # at the interpreter's end a closed pipe would be a traceback
        return int(code or 0)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:  # such as `icae-fast list store | head -1`
        _discard_output()
        return PIPE_CLOSED
    except ICAEError as error:
        return _mistake(for_command_line(str(error), command))
    except _USAGE_ERROR as error:
        return _mistake(f"{error.format_message()} (try --help)")  # type: ignore[attr-defined]
    except OSError as error:
        if error.strerror is None:  # not from the operating system
            raise
        return _mistake(_of_system(error))


def _mistake(message: str) -> int:
    try:
        stderr.print(f"icae-fast: error: {' '.join(message.split())}", style="red")
    except BrokenPipeError:
        _discard_output()
    return MISTAKE


def _of_system(error: OSError) -> str:
    """Return a sentence for an error of the operating system, such as a full disk or a name that is too long."""
    where = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else " the output"
    return f"cannot read or write{where} ({error.strerror}); check the path, its permissions and the space on the disk"


def _replace_unprintable() -> None:
    """Let stdout replace characters that its encoding does not have, as stderr does."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _discard_output() -> None:
    """Send what is left of the output nowhere, so that the interpreter can flush it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
