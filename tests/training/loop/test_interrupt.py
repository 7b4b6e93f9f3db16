"""Signals during a run: when one is noted, when it raises, and whose handlers are replaced."""

import os
import signal
import threading

import pytest

from icae_fast.training.loop import interrupt
from icae_fast.training.loop.interrupt import interruptible

pytestmark = pytest.mark.usefixtures("default_handlers")


def test_a_signal_raises_unless_it_is_deferred(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock[0])
    with interruptible() as interruption:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not interruption.requested
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.requested
            clock[0] += 1.0
            os.kill(os.getpid(), signal.SIGINT)  # the same request, repeated by a launcher
            clock[0] += 3.0
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_of_the_caller_stay():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with interruptible() as interruption, interruption.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not interruption.requested
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_has_no_handlers():
    found = []

    def work():
        with interruptible() as interruption:
            found.append((interruption.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, signal.default_int_handler)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 7), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_worker_process_ignores_ctrl_c_and_can_be_terminated(number, status):
    with interruptible() as interruption, interruption.deferred():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), number)
            finally:
                os._exit(7)
        _, code = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(code) == status
        assert not interruption.requested
