"""What the attention kernels share: work entries, tiles of heads, and which keys or queries a tile meets."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)  # finite, so that a maximum without any key so far can be subtracted


@triton.jit
def entry(work, used, index):
    """An entry of a work list: first, q_begin, q_len, k_begin, k_len (the keys that count), and all of the row's."""
    work += index.to(tl.int64) * 6
    keys = tl.load(work + 5)
    k_len = keys
    if used is not None:
        k_len = tl.load(used + tl.load(work))
    return tl.load(work + 1), tl.load(work + 2), tl.load(work + 3), tl.load(work + 4), k_len, keys


@triton.jit
def tile(pointer, start, n, stride, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows start to start + ROWS of (n, HEAD_DIM), zeros beyond its end."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D)
    pointers = pointer + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return _load(pointers, start + rows < n, columns, HEAD_DIM, D, BOUNDED)


@triton.jit
def heads_tile(
    pointer, first, queries, members, n, token_stride, head_stride,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The heads `members` of the `queries`, zeros from query n on; `first` is the first of the queries."""
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
    """The reverse of `heads_tile`, rounding."""
    columns = tl.arange(0, D)
    offsets = (queries - first) * token_stride + members * head_stride
    pointers = pointer + tl.cast(first, tl.int64) * token_stride + offsets[:, None] + columns[None, :]
    mask = (queries < n)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def key_range(lowest, highest, window, BLOCK: tl.constexpr):
    """Keys that queries at positions `lowest` to `highest` meet: begin, where all see all, from, to, and end."""
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
    """The mask of scores, for positions and keys that broadcast."""
    mask = keys <= positions
    if window is not None:
        mask &= keys > positions - window
    return mask
