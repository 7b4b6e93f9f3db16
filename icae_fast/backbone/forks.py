"""Processes forked after an ICAE has computed: they compute with one thread.

The threads of OpenMP do not survive a fork, and its first parallel region in the child waits for them forever. With one
thread there is no such region.
"""

from __future__ import annotations

import logging
import os

import torch

from icae_fast.errors import BackendError

log = logging.getLogger(__name__)

_used = False  # whether this process, or the one that it was forked from, has computed
_forked = False


def check_process(device: torch.device) -> None:
    """Note that this process computes; in a child of a process that did, switch to one thread.

    Args:
        device: where it computes.

    Raises:
        BackendError: a GPU that the parent had used.
    """
    global _used
    _used = True
    if not _forked:
        return
    if device.type != "cpu":
        raise BackendError(
            f"this process was forked after its parent had used the model on {device}, and a GPU cannot be shared that "
            "way; start processes by the method 'spawn' or 'forkserver', or fork before the first call"
        )
    if torch.get_num_threads() > 1:
        log.warning(
            "this process was forked after its parent had used an ICAE; it computes with one thread, because OpenMP's "
            "threads do not survive a fork. Start processes by the method 'spawn' or 'forkserver' for more"
        )
        torch.set_num_threads(1)


def _note_fork() -> None:
    global _forked
    _forked = _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
