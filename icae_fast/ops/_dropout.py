"""Dropout masks from a seed by a counter-based hash, identical in every backend.

The mask of element (row, col) for projection `which` is

    h = mix(mix(mix(lo(seed) ^ mix(hi(seed) + which)) + row) + col),    kept where h >= floor(p * 2^32)

in 32-bit arithmetic, where `mix` is Wellons' `lowbias32` (https://nullprogram.com/blog/2018/07/31/). Row and col are
indices into the whole x (T, d), so the mask does not depend on tiling, threads or selected rows.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def _mix(h: torch.Tensor) -> torch.Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK  # int64 wraps; the low 32 bits of a wrapped product are exact
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def dropout_scale(
    seed: torch.Tensor | None, which: int, shape: tuple[int, ...], p: float, dtype: torch.dtype, device: torch.device,
    rows: torch.Tensor | None = None,
) -> torch.Tensor | None:  # fmt: skip
    """Return the factor 0 or 1 / (1 - p) of every element, or None without dropout.

    Args:
        seed: () int64, or None for no dropout.
        which: 0 for the query projection's input, 1 for the value projection's.
        shape: (T, d) of x.
        p: probability of dropping, in [0, 1).
        dtype, device: of the result.
        rows: (n,) int64 rows to compute the mask of; all T if None.

    Returns:
        (n, d) in `dtype`.
    """
    if seed is None or p == 0.0:
        return None
    seed = seed.to(device)
    row = torch.arange(shape[0], device=device) if rows is None else rows
    col = torch.arange(shape[1], device=device)
    key = _mix((seed & _MASK) ^ _mix(((seed >> 32) + which) & _MASK))
    h = _mix((_mix((key + row[:, None]) & _MASK) + col) & _MASK)
    keep = h >= int(p * 2**32)
    return keep.to(dtype) / (1.0 - p)
