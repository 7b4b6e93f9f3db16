"""Worker process of test_store_processes.py: `python store_worker.py ROLE FOLDER NUMBER COUNT`.

It uses no model. A key determines its memory (`memory_for`), so that any process can check a memory that it reads.
"""

import contextlib
import sys
from pathlib import Path

import torch

from helpers.store import make_origin, memory_for
from icae_fast import MemoryStore


def put(folder, number, count):
    """Put this worker's keys and, every tenth time, a key that all workers share; print each key once it is stored."""
    store = MemoryStore(folder, make_origin())
    for i in range(count):
        key = f"shared-{i}" if i % 10 == 0 else f"{number}-{i}"
        store.put(key, memory_for(key))
        print(key, flush=True)


def churn(folder, number, count):
    """Put, read and delete the same few keys as the other workers."""
    store = MemoryStore(folder, make_origin())
    for i in range(count):
        key = f"shared-{(i * 7 + number) % 5}"
        store.put(key, memory_for(key))
        if i % 3 == number % 3:
            store.delete(key)
        for other in store:
            with contextlib.suppress(KeyError):  # deleted since it was listed
                assert torch.equal(store.get(other).slots, memory_for(other).slots), other


if __name__ == "__main__":
    torch.set_num_threads(1)
    role, folder, number, count = sys.argv[1:]
    {"put": put, "churn": churn}[role](Path(folder), int(number), int(count))
