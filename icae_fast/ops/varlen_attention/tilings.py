"""Candidate tile sizes of the attention kernels for each GPU: those that compile without register spills.

The autotuner measures them on the GPU. A tiling is (queries or keys of an inner step, warps, stages).
`python -m bench.kernels.check` compiles every one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from icae_fast.ops._layout import power_of_2

Tilings = list[tuple[int, int, int]]

# By generation and padded head size, for blocks of the sizes in `_LARGEST_*`. The tables `_*_FEW` are for smaller
# blocks and are keyed by their number of queries.
_FORWARD = {
    80: {64: [(64, 8, 3), (64, 8, 2), (32, 8, 3)], 128: [(32, 8, 3)], 256: [(32, 8, 2)]},
    90: {64: [(64, 8, 3), (128, 8, 2), (128, 8, 3)], 128: [(64, 8, 3), (64, 8, 2)], 256: [(32, 8, 2)]},
    100: {
        64: [(64, 8, 3), (128, 8, 2), (64, 4, 2)], 128: [(64, 8, 3), (64, 8, 2), (128, 8, 2)],
        256: [(32, 8, 2), (32, 8, 3)],
    },
}  # fmt: skip
_FORWARD_FEW = {
    16: {64: [(64, 4, 3), (32, 4, 3)], 128: [(64, 8, 3)], 256: [(32, 8, 2)]},
    32: {64: [(64, 4, 3), (32, 4, 3)], 128: [(32, 4, 2)], 256: [(32, 8, 2)]},
}
_DQ = {
    80: {64: [(64, 8, 3), (32, 8, 2)], 128: [(32, 8, 2), (32, 8, 3)], 256: [(32, 8, 1)]},
    90: {64: [(64, 8, 3), (64, 8, 2)], 128: [(32, 8, 3), (64, 8, 1)], 256: [(32, 8, 2)]},
    100: {64: [(64, 8, 2), (64, 8, 3), (64, 4, 2)], 128: [(64, 8, 2), (64, 8, 3)], 256: [(32, 8, 2)]},
}
_DQ_FEW = {
    16: {64: [(64, 4, 3), (32, 4, 3)], 128: [(32, 4, 2), (32, 8, 3)], 256: [(32, 8, 3)]},
    64: {64: [(64, 4, 3), (32, 4, 3)], 128: [(32, 4, 2), (32, 8, 3)], 256: [(32, 8, 2)]},
}
_DK_DV = {
    80: {64: [(32, 8, 2), (32, 8, 3)], 128: [(32, 8, 2), (32, 8, 3)], 256: [(32, 8, 2)]},
    90: {64: [(32, 8, 3), (64, 8, 2), (64, 8, 3)], 128: [(32, 8, 2), (32, 8, 1)], 256: [(32, 8, 2), (32, 8, 3)]},
    100: {64: [(64, 8, 2), (64, 8, 3)], 128: [(32, 8, 2), (64, 8, 2), (64, 8, 3)], 256: [(32, 8, 2)]},
}
# A window has two edges and so two masked loops, for which some of the above tilings spill.
_WINDOWED = {
    ("forward", 90): {128: [(32, 8, 2)], 256: [(32, 8, 1), (16, 8, 1)]},
    ("forward", 100): {64: [(64, 8, 3)], 128: [(64, 8, 3), (64, 8, 2)]},
    ("dq", 80): {128: [(32, 8, 2)]},
    ("dk_dv", 90): {128: [(32, 8, 1)]},
}
_LARGEST_QUERIES = {80: {64: 128, 128: 128, 256: 64}, 90: {64: 128, 128: 128, 256: 128}}
_LARGEST_KEYS = {80: {64: 128, 128: 64, 256: 32}, 90: {64: 128, 128: 128, 256: 32}, 100: {64: 128, 128: 128, 256: 64}}


def padded(head_dim: int) -> int:
    """Return the smallest power of two that holds a head, at least 16 as matrix products on a GPU require."""
    return max(16, power_of_2(head_dim))


def largest_query_block(arch: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return the number of queries in a block of the forward and of dq for long rows."""
    if arch == 0:
        return 64 if padded(head_dim) <= 128 else 32
    if dtype == torch.float32:  # without tensor cores the operands of a product are in registers
        return 32 if padded(head_dim) <= 64 else 16
    return _of(_LARGEST_QUERIES, arch, padded(head_dim))


def key_block(arch: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return the number of keys in a block of dk and dv."""
    if arch == 0:
        return 64
    if dtype == torch.float32:
        return 32 if padded(head_dim) <= 128 else 16
    return _of(_LARGEST_KEYS, arch, padded(head_dim))


def forward(arch: int, arguments: Mapping[str, Any]) -> list[triton.Config]:
    """Return the configurations of the forward."""
    return _configs("BLOCK_N", _by_queries("forward", arch, arguments, _FORWARD, _FORWARD_FEW))


def dq(arch: int, arguments: Mapping[str, Any]) -> list[triton.Config]:
    """Return the configurations of the kernel of dq."""
    return _configs("BLOCK_N", _by_queries("dq", arch, arguments, _DQ, _DQ_FEW))


def dk_dv(arch: int, arguments: Mapping[str, Any]) -> list[triton.Config]:
    """Return the configurations of the kernel of dk and dv."""
    if arch == 0:
        return _configs("BLOCK_M", [(64, 4, 1)])
    if arguments["q"].dtype == torch.float32:
        return _configs("BLOCK_M", [(16, 4, 1)])
    return _configs("BLOCK_M", _windowed("dk_dv", arch, arguments) or _of(_DK_DV, arch, arguments["D"]))


def _by_queries(name, arch, arguments, table, few) -> Tilings:
    d, dtype = arguments["D"], arguments["q"].dtype
    if arch == 0:
        return [(64, 4, 1)]
    if dtype == torch.float32:
        return [(16, 8 if name == "dq" and d > 64 else 4, 1)]
    if arguments["BLOCK_M"] < largest_query_block(arch, d, dtype):
        return _of(few, arguments["BLOCK_M"], d)
    return _windowed(name, arch, arguments) or _of(table, arch, d)


def _windowed(name, arch, arguments):
    """Return the entry of `_WINDOWED`, None without an entry or without a window."""
    generation = max((g for g in _FORWARD if g <= arch), default=80)
    by_size = _WINDOWED.get((name, generation), {}) if arguments["window"] is not None else {}
    return by_size.get(max(arguments["D"], 64))


def _of(table, key, d):
    """Return the tilings of the largest key <= `key`, else of the smallest, for a padded head size."""
    return table[max((k for k in table if k <= key), default=min(table))][max(d, 64)]


def _configs(name, tilings: Tilings):
    return [triton.Config({name: size}, num_warps=warps, num_stages=stages) for size, warps, stages in tilings]
