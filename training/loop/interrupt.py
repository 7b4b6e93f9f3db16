"""Ctrl-C and SIGTERM during a run: the optimiser step in progress is finished and saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

# A launcher repeats a Ctrl-C that the terminal has already sent to all processes.
_REPEATED_WITHIN_S = 3.0


class Interruption:
    """Requests to end a run.

    Attributes:
        requested: whether one came while they were deferred.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        self._first_at = 0.0
        self._process = os.getpid()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Note a request in `requested` instead of raising `KeyboardInterrupt`; a second one after 3 s raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != self._process:  # a worker process that reads data inherits the handler
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if not self._deferred or (self.requested and now - self._first_at > _REPEATED_WITHIN_S):
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first_at = True, now


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Handle Ctrl-C and SIGTERM by an `Interruption` in the context.

    Signals that are ignored or have a handler of the caller keep it, and so do all in another thread than the main one.
    """
    interruption = Interruption()
    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    replaced: list[int] = []
    if threading.current_thread() is threading.main_thread():
        replaced = [number for number, handler in defaults.items() if signal.getsignal(number) == handler]
    for number in replaced:
        signal.signal(number, interruption.handle)
    try:
        yield interruption
    finally:
        for number in replaced:
            signal.signal(number, defaults[number])
