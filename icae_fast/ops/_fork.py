"""Ops in a forked process.

GNU OpenMP keeps the threads of its last parallel region and waits for them in the next one. A forked process inherits
the pool and not its threads, so its first parallel region, of this package or of torch, would wait forever.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch

_TASKS = Path("/proc/self/task")
_LOG = logging.getLogger(__name__)

_had_threads = False


def compute_on_one_thread_after_forks() -> None:
    """Let processes that are forked from now on compute on one thread if this one has started others.

    A process that has no other thread has no pool, and its children keep their number of threads. Elsewhere than on
    Linux, OpenMP makes a new pool after a fork by itself.
    """
    if sys.platform == "linux":
        os.register_at_fork(before=_look_for_threads, after_in_child=_leave_pool)


def _look_for_threads() -> None:
    global _had_threads
    try:
        _had_threads = sum(1 for _ in _TASKS.iterdir()) > 1
    except OSError:
        _had_threads = True


def _leave_pool() -> None:
    if _had_threads and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        _LOG.info("forked from a process with threads: torch and icae_fast compute on one thread here")
