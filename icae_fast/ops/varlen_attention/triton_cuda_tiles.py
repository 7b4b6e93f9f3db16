"""Work entries, tiles of heads, key ranges and masks, shared by the attention kernels."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)  # finite, so that the maximum before the first key can be subtracted


@triton.jit
def entry(work, used, index):
    """Return an entry of a work list: first, q_begin, q_len, k_begin, number of valid keys, and of all keys."""
    work += index.to(tl.int64) * 6
    keys = tl.load(work + 5)
    k_len = keys
    if used is not None:
        k_len = tl.load(used + tl.load(work))
    return tl.load(work + 1), tl.load(work + 2), tl.load(work + 3), tl.load(work + 4), k_len, keys


@triton.jit
def tile(pointer, start, n, stride, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr):
    """Load rows start to start + ROWS of (n, HEAD_DIM), zeros beyond the end."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D)
    pointers = pointer + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return _load(pointers, start + rows < n, columns, HEAD_DIM, D, BOUNDED)


@triton.jit
def heads_tile(
    pointer, first, queries, members, n, token_stride, head_stride,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Load heads `members` of `queries`, zeros from query n on; `first` is the first of the queries."""
    columns = tl.arange(0, D)
    offsets = (queries - first) * token_stride + members * head_stride
    pointers = pointer + tl.cast(first, tl.int64) * token_stride + offsets[:, None] + columns[None, :]
    return _load(pointers, queries < n, columns, HEAD_DIM, D, BOUNDED)


@triton.jit
def _load(pointers, inside, columns, HEAD_DIM: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr):
    if BOUNDED and HEAD_DIM < D:
        return tl.load(pointers, mask=inside[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    elif HEAD_DIM < D:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_heads(
    pointer, value, first, queries, members, n, token_stride, head_stride, HEAD_DIM: tl.constexpr, D: tl.constexpr
):
    """Round and store a tile that `heads_tile` would load."""
    columns = tl.arange(0, D)
    offsets = (queries - first) * token_stride + members * head_stride
    pointers = pointer + tl.cast(first, tl.int64) * token_stride + offsets[:, None] + columns[None, :]
    mask = (queries < n)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def key_range(lowest, highest, window, BLOCK: tl.constexpr):
    """Return the keys that positions `lowest` to `highest` see: begin, begin and end of the unmasked part, end."""
    begin = 0
    if window is not None:
        begin = tl.maximum(lowest - window + 1, 0)
    full_end = begin + tl.maximum(lowest + 1 - begin, 0) // BLOCK * BLOCK
    full_begin = begin
    if window is not None:
        full_begin += tl.cdiv(tl.maximum(highest - window + 1 - begin, 0), BLOCK) * BLOCK
        full_begin = tl.minimum(full_begin, full_end)
    return begin, full_begin, full_end, highest + 1


@triton.jit
def visible(positions, keys, window):
    """Return the mask of scores, for positions and keys that broadcast."""
    mask = keys <= positions
    if window is not None:
        mask &= keys > positions - window
    return mask
