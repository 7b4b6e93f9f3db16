"""Fixtures of the training loop."""

import signal

import pytest


@pytest.fixture
def default_handlers():
    """Python's own handlers; in a background job of a shell Ctrl-C is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
