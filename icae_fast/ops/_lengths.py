"""What the host knows of `cu_seqlens` tensors, so that launching a kernel never waits for the GPU."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary


class Known:
    """What a tensor held when it was read.

    Attributes:
        values: its elements.
        tables: what is made of them and of another tensor's, by what is known of that one; gone with either.
    """

    def __init__(self, values: Sequence[int]) -> None:
        self.values = tuple(values)
        self.tables: weakref.WeakKeyDictionary[Known, dict[Any, Any]] = weakref.WeakKeyDictionary()

    @functools.cached_property
    def longest(self) -> int:
        """The most that lies between two neighbours, 0 for none."""
        return max((b - a for a, b in pairwise(self.values)), default=0)


# Tensor -> (its version then, what is known); gone with the tensor.
_KNOWN = WeakIdKeyDictionary()
# The tensor asked for last, its version and what is known: the layers of a batch ask for the same, and the dictionary
# takes 3 us. A reference that has died early, as that of a tensor may whose Python object comes back, finds nothing.
_NOTHING = (lambda: None, 0, lambda: None)
_last: tuple[Callable[[], Any], int, Callable[[], Known | None]] = _NOTHING


def remember(cu_seqlens: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
    """Note what a tensor holds; gives the tensor."""
    global _last
    _KNOWN[cu_seqlens] = (_version(cu_seqlens), Known(values))
    _last = _NOTHING
    return cu_seqlens


def known(cu_seqlens: torch.Tensor) -> Known:
    """What a small integer tensor holds. One that nobody has remembered is copied once, waiting for the device."""
    global _last
    tensor, seen, last = _last
    version = _version(cu_seqlens)
    if tensor() is cu_seqlens and seen == version and (found := last()) is not None:
        return found
    entry = _KNOWN.get(cu_seqlens)
    if entry is None or entry[0] != version:
        remember(cu_seqlens, cu_seqlens.tolist())
        entry = _KNOWN[cu_seqlens]
    _last = (weakref.ref(cu_seqlens), version, weakref.ref(entry[1]))
    return entry[1]


def on_host(cu_seqlens: torch.Tensor) -> tuple[int, ...]:
    """The values of such a tensor."""
    return known(cu_seqlens).values


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version
