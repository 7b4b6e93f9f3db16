"""Ops in a forked process.

GNU OpenMP keeps the threads of its last parallel region and waits for them in the next one. A forked process inherits
the pool and not its threads, so its first parallel region, of this package or of torch, would wait forever. On one
thread no region is opened.
"""

from __future__ import annotations

import logging
import os
import sys

import torch

_LOG = logging.getLogger(__name__)


def compute_on_one_thread_after_forks() -> None:
    """Let processes that are forked from now on compute on one thread, as torch's data loaders do.

    Whether a pool exists cannot be seen from outside. A child that knows that there is none may call
    `torch.set_num_threads`. OpenMP elsewhere than on Linux makes a new pool after a fork by itself.
    """
    if sys.platform == "linux":
        os.register_at_fork(after_in_child=_leave_pool)


def _leave_pool() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        _LOG.info("this process was forked: torch and icae_fast compute on one thread here")
