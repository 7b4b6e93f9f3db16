"""A 64-bit fingerprint of the bytes of tensors, to detect changed weights in one pass over memory.

Writes through `.data` do not increment version counters, so a cache computed from weights has to compare the weights
themselves. Fingerprints are comparable only within one process: C++, Triton and plain torch compute different ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.library import Library

from icae_fast.ops._declare import NAMESPACE, has_triton, imported_when_called, interpreted
from icae_fast.ops.fingerprint import ref

__all__ = ["fingerprint"]


def fingerprint(tensors: Sequence[torch.Tensor]) -> int:
    """Return a 64-bit number that changes when the tensors' bytes, byte sizes or order change.

    A single changed word (64 bits in C++, 32 in plain torch and Triton) is always detected. Several changes cancel as
    often as random numbers collide, once in 2 ** 64 and about 2 ** 32 cases: each word counts by its position, so that
    a permutation is a change, and down to its sign bit.

    Args:
        tensors: at least one tensor, of any dtypes and shapes, all on one device; strided ones are copied.
    """
    with torch.no_grad():
        return torch.ops.icae_fast.fingerprint(list(tensors))


# Not in `REGISTRY`, because there are no numerics to compare; the dispatcher only selects by device.
_LIBRARY = Library(NAMESPACE, "FRAGMENT")
_LIBRARY.define("fingerprint(Tensor[] tensors) -> int")
_LIBRARY.impl("fingerprint", ref.fingerprint, "CompositeExplicitAutograd")
if has_triton():
    for _key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
        _LIBRARY.impl("fingerprint", imported_when_called("icae_fast.ops.fingerprint.triton_cuda:fingerprint"), _key)
