"""`fingerprint` in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

_ROW = 1024
_MULTIPLIER = 0x1E3779B97F4A7C15  # odd, so that multiplication is a bijection


def fingerprint(tensors: Sequence[torch.Tensor]) -> int:
    """Hash 32-bit words x with random odd 64-bit factors f, modulo 2 ** 64 (multilinear hashing):

        sum_i f_i sum_j f_j x_ij    over rows of 1024 words

    A changed word changes the sum, since a nonzero number below 2 ** 32 times an odd number is not 0.

    Source: Lemire and Kaser, arXiv 1202.4961, on two changes.
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
