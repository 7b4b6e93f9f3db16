"""What the processes of test_store_processes.py do: `python store_worker.py ROLE FOLDER NUMBER COUNT`.

No model is made; a key says what its memory must hold (`memory_for`), so that any process can tell a right one.
"""

import contextlib
import sys
from pathlib import Path

import torch

from helpers.store import make_origin, memory_for
from icae_fast import MemoryStore


def put(folder, number, count):
    """Puts keys of its own and, every tenth time, one that all processes share; says each when it is stored."""
    store = MemoryStore(folder, make_origin())
    for i in range(count):
        key = f"shared-{i}" if i % 10 == 0 else f"{number}-{i}"
        store.put(key, memory_for(key))
        print(key, flush=True)


def churn(folder, number, count):
    """Puts, reads and deletes the same few keys as its rivals."""
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
