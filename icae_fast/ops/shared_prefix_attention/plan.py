"""The division of attention into thread blocks, planned on the host from lengths only, once for all layers.

Consecutive segments that the same rows read form a chain. Its keys are cut into splits of about equal work, and its
queries, with all heads of a GQA group, into tiles. An item is one tile with one split, or one tile of one row with one
split of its tail, whose length only the device knows. Items that share a query write to different slots.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from icae_fast.ops._layout import upload

Table = TypeVar("Table")
Place = tuple[torch.device, int]  # device and stream

ITEM = 8  # first query, end query, tile's first row, first piece, end piece, slot, row of a tail or -1, split of a tail
PIECE = 4  # source, first key, end key, position of the source's key 0 in the row
SOURCE = 8  # addresses of keys and values, and for each the strides of key, head and layer in elements

# With fewer keys a block, merging costs more than the parallelism gains.
_MIN_SPLIT = 128
_BLOCKS_PER_SM = 2


@dataclass(frozen=True)
class Shape:
    """Inputs of a plan; equal shapes have the same plan.

    Args:
        starts: start of each row's queries, then their end.
        lengths: keys of each segment.
        prefix_rows: first row and one past the last row of each segment, flattened.
        capacity: keys that fit into the tails of all rows together.
        group: query heads of a key/value head.
        num_kv_heads: Hkv.
        multiprocessors: number of the device's multiprocessors.
        windowed: whether a window may hide keys.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    prefix_rows: tuple[int, ...]
    capacity: int
    group: int
    num_kv_heads: int
    multiprocessors: int
    windowed: bool

    @property
    def n_rows(self) -> int:
        """Number of rows, R."""
        return len(self.starts) - 1


@dataclass(frozen=True)
class Plan:
    """Tables for the kernel.

    Args:
        items: (n, ITEM) int32.
        pieces: (m, PIECE) int32, the last one for tails.
        places: (2, Tq) int32, each query's row and its position in the row minus the tail's length; None without
            windows.
        group: query heads of a key/value head.
        block_m: rows of a tile.
        tail_splits: parts of every tail.
        slots: maximum number of partial results of a query.
    """

    items: torch.Tensor
    pieces: torch.Tensor
    places: torch.Tensor | None
    group: int
    block_m: int
    tail_splits: int
    slots: int


@dataclass
class _Chain:
    rows: tuple[int, int]
    pieces: list[tuple[int, int, int, int]]

    @property
    def keys(self) -> int:
        return sum(end - begin for _, begin, end, _ in self.pieces)


_keepers: list[list[Any]] = []


@contextlib.contextmanager
def kept() -> Iterator[list[Any]]:
    """Collect every table used in the block so that a longer-lived owner (e.g. a CUDA graph) can keep it alive."""
    tables: list[Any] = []
    _keepers.append(tables)
    try:
        yield tables
    finally:
        _keepers.pop()


def plan(shape: Shape, device: torch.device, max_block_m: int) -> Plan:
    """Return the plan of a shape, from a cache."""
    return _noted(_plan(shape, _place(device), max_block_m))


def sources(layout: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """Return the table (n, SOURCE) int64 of the addresses and strides of keys and values, from a cache."""
    return _noted(_sources(layout, _place(device)))


def _noted(table: Table) -> Table:
    for tables in _keepers:
        tables.append(table)
    return table


def _place(device: torch.device) -> Place:
    """Return device and stream, a cache key: a table may be read only on the stream that wrote it."""
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _upload(rows: Sequence[Sequence[int]], width: int, dtype: torch.dtype, place: Place) -> torch.Tensor:
    return upload(torch.tensor(rows, dtype=dtype).view(-1, width), place[0])


@functools.lru_cache(maxsize=256)
def _sources(layout: tuple[tuple[int, ...], ...], place: Place) -> torch.Tensor:
    return _upload(layout, SOURCE, torch.int64, place)


@functools.lru_cache(maxsize=64)
def _plan(shape: Shape, place: Place, max_block_m: int) -> Plan:
    chains = _chains(shape)
    tails = [(r, r + 1) for r in range(shape.n_rows)]
    most = max((_queries(shape, rows) * shape.group for rows in [*tails, *(c.rows for c in chains)]), default=1)
    block_m = 16
    while block_m < min(most, max_block_m):
        block_m *= 2
    target = _BLOCKS_PER_SM * shape.multiprocessors
    tail_tiles = sum(len(_tiles(shape, rows, block_m)) for rows in tails) * shape.num_kv_heads
    tail_splits = max(
        1, min(-(-target // max(tail_tiles, 1)), shape.capacity // max(shape.n_rows, 1) // _MIN_SPLIT, 16)
    )
    work = sum(len(_tiles(shape, c.rows, block_m)) * c.keys for c in chains) * shape.num_kv_heads
    split = max(_MIN_SPLIT, -(-work // target))
    used = [0] * shape.n_rows
    items: list[list[int]] = []
    pieces: list[tuple[int, int, int, int]] = []
    for chain in chains:
        slot = max(used[slice(*chain.rows)])
        for part in _parts(chain, split):
            first = len(pieces)
            pieces += part
            items += [[*tile, first, len(pieces), slot, -1, 0] for tile in _tiles(shape, chain.rows, block_m)]
            slot += 1
        for row in range(*chain.rows):
            used[row] = slot
    pieces.append((len(shape.lengths), 0, 0, 0))
    for row, rows in enumerate(tails):
        for i in range(tail_splits):
            one = [len(pieces) - 1, len(pieces), used[row] + i, row, i]
            items += [[*tile, *one] for tile in _tiles(shape, rows, block_m)]
    return Plan(
        items=_upload(items, ITEM, torch.int32, place),
        pieces=_upload(pieces, PIECE, torch.int32, place),
        places=_upload(_places(shape), shape.starts[-1], torch.int32, place) if shape.windowed and items else None,
        group=shape.group,
        block_m=block_m,
        tail_splits=tail_splits,
        slots=max(used, default=0) + tail_splits,
    )


def _segments(shape: Shape) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Yield number, length and rows of each segment that has keys and rows."""
    for i, n in enumerate(shape.lengths):
        rows = shape.prefix_rows[2 * i], shape.prefix_rows[2 * i + 1]
        if n and rows[0] < rows[1]:
            yield i, n, rows


def _chains(shape: Shape) -> list[_Chain]:
    chains: list[_Chain] = []
    read = [0] * shape.n_rows
    last: list[_Chain | None] = [None] * shape.n_rows
    for i, n, rows in _segments(shape):
        chain = last[rows[0]]
        if chain is None or chain.rows != rows or any(last[r] is not chain for r in range(*rows)):
            chains.append(chain := _Chain(rows, []))
        chain.pieces.append((i, 0, n, read[rows[0]]))
        for r in range(*rows):
            read[r] += n
            last[r] = chain
    return [c for c in chains if _queries(shape, c.rows)]


def _queries(shape: Shape, rows: Sequence[int]) -> int:
    return shape.starts[rows[1]] - shape.starts[rows[0]]


def _tiles(shape: Shape, rows: Sequence[int], block_m: int) -> list[tuple[int, int, int]]:
    """Return tiles: first and end query of the rows, and the tile's start in queries times heads of the group."""
    begin, end = shape.starts[rows[0]], shape.starts[rows[1]]
    return [(begin, end, first) for first in range(0, (end - begin) * shape.group, block_m)]


def _parts(chain: _Chain, split: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Yield parts of a chain with about `split` keys at most."""
    n = -(-chain.keys // split)
    size = -(-chain.keys // n // 16) * 16  # keeps blocks of keys whole
    part, room = [], size
    for source, begin, end, place in chain.pieces:
        while begin < end:
            taken = min(room, end - begin)
            part.append((source, begin, begin + taken, place))
            begin, room = begin + taken, room - taken
            if not room:
                yield part
                part, room = [], size
    if part:
        yield part


def _places(shape: Shape) -> list[list[int]]:
    read = [0] * shape.n_rows
    for _, n, rows in _segments(shape):
        for r in range(*rows):
            read[r] += n
    row_of: list[int] = []
    places: list[int] = []
    for r in range(shape.n_rows):
        n = shape.starts[r + 1] - shape.starts[r]
        row_of += [r] * n
        places += range(read[r] - n, read[r])
    return [row_of, places]
