"""Cut work off at a chosen line of the package, by an exception or by killing the process."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

_PACKAGE = Path(__file__).parents[3] / "icae_fast"


class Cut(BaseException):
    """Raised where work is cut off; no `except Exception` catches it."""


class Lines:
    """Counts the lines of some modules that run, and acts at one of them.

    Args:
        modules: folders and files below `icae_fast`.
        at: number of the line, from 1; None to count only.
        act: called before the line runs.
    """

    def __init__(self, modules, at=None, act=None):
        self.count, self._at, self._act = 0, at, act
        self._places = tuple(str(_PACKAGE / module) for module in modules)

    def _trace(self, frame, event, _):
        if event == "call":
            return self._trace if frame.f_code.co_filename.startswith(self._places) else None
        if event == "line":
            self.count += 1
            if self.count == self._at:
                self._act()
        return self._trace

    def __enter__(self):
        self._before = sys.gettrace()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)
        threading.settrace(None)


def count_lines(work, modules):
    """Return how many lines of the modules `work()` runs."""
    with Lines(modules) as lines:
        work()
    return lines.count


class _Calls:
    """Counts the calls of the operating system and of SQLite that Python reports, and fails one of them."""

    def __init__(self):
        self.count, self._at, self._error, self._thread = 0, None, None, None
        sys.addaudithook(self._hook)  # for the life of the process: hooks cannot be removed

    def _hook(self, event, _):
        if self._thread == threading.get_ident() and (event == "open" or event.startswith(("os.", "sqlite3.connect"))):
            self.count += 1
            if self.count == self._at:
                raise self._error

    def fail(self, work, at, error):
        """Run `work()` with an error raised in a call; return whether it got that far."""
        self.count, self._at, self._error, self._thread = 0, at, error, threading.get_ident()
        try:
            work()
        except (Cut, Exception):
            if self.count < at:
                raise
        finally:
            self._thread = None
        return self.count >= at


_calls = []


def cut_off(work, at, error):
    """Run `work()` with an error raised in the `at`-th call of the operating system; return whether it got that far."""
    if not _calls:
        _calls.append(_Calls())
    return _calls[0].fail(work, at, error)


def killed(work, modules, at):
    """Run `work()` in a forked process that kills itself at a line; return whether it got that far."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), Lines(modules, at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            work()
            os._exit(0)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the work ended with {status}"
    return status != 0
