"""A memory store with several processes, and with a process that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.store import make_origin, memory_for
from icae_fast import MemoryStore

WORKER = Path(__file__).with_name("store_worker.py")


@pytest.fixture
def start(tmp_path):
    """Return `start(role, number, count)`, which starts a worker on `tmp_path / "store"`; all end with the test."""
    running = []

    def call(role, number, count):
        command = [sys.executable, str(WORKER), role, str(tmp_path / "store"), str(number), str(count)]
        path = os.pathsep.join([*(str(WORKER.parents[n]) for n in (2, 1)), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        running.append(process)
        return process

    yield call
    for process in running:
        process.kill()
        process.communicate()


def check_all(store, keys):
    """Assert that every key has its memory."""
    for key in keys:
        assert torch.equal(store.get(key).slots, memory_for(key).slots), key


def test_kill_during_a_thousand_puts_loses_nothing_that_was_returned(start, tmp_path):
    returned = []
    for number, until in enumerate((1, 40, 200, 333)):
        process = start("put", number, 1000)
        for line in process.stdout:
            returned.append(line.strip())
            if len(returned) >= until * (number + 1):
                break
        process.send_signal(signal.SIGKILL)
        # A complete line was printed after its put; the last line may be cut off.
        returned += process.stdout.read().split("\n")[:-1]
        assert process.wait() == -signal.SIGKILL
    assert len(returned) > 600
    with MemoryStore(tmp_path / "store", make_origin(), create=False) as store:
        check_all(store, returned)
        check_all(store, store.keys())
        assert len(store) >= len(set(returned))
        files = {p for p in (tmp_path / "store").glob("??/*") if p.is_file()}
        waste = len(files) - len(store)
        assert store.clean(older_than=3600) == 0
        time.sleep(0.01)
        assert store.clean(older_than=0) == waste
        check_all(store, store.keys())


def test_kills_at_forty_moments_of_a_put(tmp_path):
    folder, returned = tmp_path / "store", []
    MemoryStore(folder, make_origin()).close()
    for number in range(40):
        end, start = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(end)
                store = MemoryStore(folder, make_origin())
                for i in range(1000):
                    store.put(f"{number}-{i}", memory_for(f"{number}-{i}"))
                    os.write(start, f"{number}-{i}\n".encode())
            finally:
                os._exit(1)
        os.close(start)
        with os.fdopen(end) as pipe:
            returned.append(pipe.readline().strip())
            time.sleep(number * 1e-4)  # a put takes about a millisecond
            os.kill(child, signal.SIGKILL)
            returned += pipe.read().split("\n")[:-1]
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with MemoryStore(folder, make_origin(), create=False) as store:
        check_all(store, returned)
        check_all(store, store.keys())


def test_four_processes_write_at_once(start, tmp_path):
    workers = [start("put", n, 100) for n in range(4)]
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        assert len(out.split()) == 100
    with MemoryStore(tmp_path / "store", make_origin(), create=False) as store:
        keys = list(store)
        assert len(keys) == len(store) == 4 * 90 + 10
        check_all(store, keys)
        files = list((tmp_path / "store").glob("??/*"))
        assert len(files) == len(keys)  # replaced files are deleted


def test_putting_reading_and_deleting_the_same_keys(start, tmp_path):
    workers = [start("churn", n, 60) for n in range(4)]
    for worker in workers:
        _, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
    with MemoryStore(tmp_path / "store", make_origin(), create=False) as store:
        check_all(store, store.keys())
        assert len(list((tmp_path / "store").glob("??/*"))) == len(store)


def test_a_store_goes_on_working_after_a_fork(tmp_path):
    store = MemoryStore(tmp_path / "store", make_origin())
    store.put("parent", memory_for("parent"))
    child = os.fork()
    if child == 0:
        try:
            check_all(store, ["parent"])
            store.put("child", memory_for("child"))
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    store.put("later", memory_for("later"))
    check_all(store, ["parent", "child", "later"])
    assert list(store.keys()) == ["child", "later", "parent"]


def test_two_stores_opened_after_a_fork_keep_what_they_put(tmp_path):
    """A forked process does not take SQLite's locks of its parent for its own, whose log the parent would delete."""
    folder = tmp_path / "store"
    mine = [MemoryStore(folder, make_origin()) for _ in range(2)]
    mine[0].put("parent", memory_for("parent"))
    assert len(mine[1]) == 1
    ready, closed = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stores = [MemoryStore(folder, make_origin()) for _ in range(2)]
            for n, store in enumerate(stores):
                store.put(f"first-{n}", memory_for(f"first-{n}"))
            os.write(ready[1], b"x")
            os.read(closed[0], 1)
            for n, store in enumerate(stores):
                store.put(f"second-{n}", memory_for(f"second-{n}"))
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.read(ready[0], 1)
    for store in mine:
        store.close()
    os.write(closed[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    for end in (*ready, *closed):
        os.close(end)
    with MemoryStore(folder, make_origin(), create=False) as store:
        assert list(store) == ["first-0", "first-1", "parent", "second-0", "second-1"]
        check_all(store, store.keys())
