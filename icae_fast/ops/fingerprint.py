"""Has a weight changed? A 64-bit fingerprint of the bytes of tensors, in one pass over memory.

Writes through `.data` bump no version counter, so whoever keeps something computed from weights has to look at the
weights themselves. The number means nothing outside of this process: C++, Triton and plain torch compute different
ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.library import Library

from icae_fast.ops._declare import NAMESPACE, has_triton, imported_when_called, interpreted

_ROW = 1024
_MULTIPLIER = 0x1E3779B97F4A7C15  # odd: multiplication loses nothing


def fingerprint(tensors: Sequence[torch.Tensor]) -> int:
    """A 64-bit number that is another one when the tensors' bytes, sizes in bytes or order are others.

    A single changed word (64 bits in C++, 32 in plain torch and Triton) is always seen. Several changes cancel as often
    as random numbers are equal, once in 2 ** 64 and about 2 ** 32 cases: each word counts by its place, so that a
    permutation is a change, and down to its sign bit.

    Args:
        tensors: at least one, of any dtypes and shapes, all on one device; strided ones are copied.
    """
    with torch.no_grad():
        return torch.ops.icae_fast.fingerprint(list(tensors))


def _fingerprint_torch(tensors: Sequence[torch.Tensor]) -> int:
    """Multilinear hashing, modulo 2 ** 64: 32-bit words x times random odd factors f of 64 bits,

        sum_i f_i sum_j f_j x_ij    over rows of 1024 words

    A changed word changes the sum, since less than 2 ** 32 times an odd number is not 0. Lemire and Kaser, arXiv
    1202.4961, on two changes.
    """
    device = tensors[0].device
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        words = F.pad(data, (0, -data.numel() % (4 * _ROW))).view(torch.int32).view(-1, _ROW)
        sums = (words * _factors(_ROW, device)).sum(1)
        total = total * _MULTIPLIER + (sums * _factors(len(sums), device)).sum() + data.numel()
    return int(total)


@functools.lru_cache(maxsize=64)
def _factors(n: int, device: torch.device) -> torch.Tensor:
    values = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(n))
    return (values | 1).to(device)


# Not an op of the registry: it has no numerics to compare, only a device to be chosen by.
_LIBRARY = Library(NAMESPACE, "FRAGMENT")
_LIBRARY.define("fingerprint(Tensor[] tensors) -> int")
_LIBRARY.impl("fingerprint", _fingerprint_torch, "CompositeExplicitAutograd")
if has_triton():
    for _key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
        _LIBRARY.impl("fingerprint", imported_when_called("icae_fast.ops.triton_cuda_fingerprint:fingerprint"), _key)
