"""The dropout masks of `icae_fast.ops._dropout` in Triton, with the same 32-bit arithmetic and so the same masks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def row_keys(seed, which, rows):
    """Return the hash state of rows of x, which `kept` continues.

    Args:
        seed: pointer to the int64.
        which: 0 for the query projection's input, 1 for the value projection's.
        rows: row numbers in the whole x.
    """
    value = tl.load(seed)
    key = _mix(value.to(tl.uint32) ^ _mix((value >> 32).to(tl.uint32) + which))
    return _mix(key + rows.to(tl.uint32))


@triton.jit
def kept(keys, columns, threshold):
    """Return which elements are kept, for keys (rows, 1) and columns (1, n), or other shapes that broadcast."""
    return _mix(keys + columns.to(tl.uint32)) >= threshold
