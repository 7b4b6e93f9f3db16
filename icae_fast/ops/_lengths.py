"""What the host knows of `cu_seqlens` tensors, so that launching a kernel never waits for the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

# Tensor -> (its version then, values); gone with the tensor.
_KNOWN = WeakIdKeyDictionary()


def remember(cu_seqlens: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
    """Note what a tensor holds; gives the tensor."""
    _KNOWN[cu_seqlens] = (_version(cu_seqlens), tuple(values))
    return cu_seqlens


def on_host(cu_seqlens: torch.Tensor) -> tuple[int, ...]:
    """The values of a small integer tensor. One that nobody has remembered is copied once, waiting for the device."""
    known = _KNOWN.get(cu_seqlens)
    if known is None or known[0] != _version(cu_seqlens):
        remember(cu_seqlens, cu_seqlens.tolist())
        known = _KNOWN[cu_seqlens]
    return known[1]


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version
