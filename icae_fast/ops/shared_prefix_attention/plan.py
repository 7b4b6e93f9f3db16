"""Who attends to what in which block, worked out on the host from lengths alone; nothing here depends on the layer.

Segments that are read by the same rows one behind the other make a chain. Its keys are cut into splits of about equal
work, and its queries, with all heads of a GQA group, into tiles. An item is one tile with one split, or one tile of one
row with one split of its tail, whose length only the device knows. Items that share a query write to different slots.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from icae_fast.ops._layout import upload

ITEM = 8  # first query, end query, tile's first row, first piece, end piece, slot, row of a tail or -1, split of a tail
PIECE = 4  # source, first key, end key, place of the source's key 0 in the row
SOURCE = 8  # addresses of keys and values; of each, strides of key, head and layer in elements

# Fewer keys a block would pay more for merging than they gain.
_MIN_SPLIT = 128
_BLOCKS_PER_SM = 2


@dataclass(frozen=True)
class Shape:
    """What a plan depends on.

    Args:
        starts: where each row's queries begin, and their end.
        lengths: keys of each segment.
        prefix_rows: first row and one after the last row of each segment, one behind the other.
        capacity: keys that all tails together may hold.
        group: query heads of a key/value head.
        num_kv_heads: Hkv.
        multiprocessors: of the device.
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
        """R."""
        return len(self.starts) - 1


@dataclass(frozen=True)
class Plan:
    """Tables for the kernel.

    Args:
        items: (n, ITEM) int32.
        pieces: (m, PIECE) int32, the last one for tails.
        places: (2, Tq) int32, each query's row and its place in it less the tail's length; None without windows.
        group: query heads of a key/value head.
        block_m: rows of a tile.
        tail_splits: parts of every tail.
        slots: partial results of a query at most.
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


_keepers: list[list] = []


@contextlib.contextmanager
def kept() -> Iterator[list]:
    """Collects the tables that are used in a `with` block, for who needs them longer, such as a CUDA graph."""
    _keepers.append(tables := [])
    try:
        yield tables
    finally:
        _keepers.pop()


def plan(shape: Shape, device: torch.device, max_block_m: int) -> Plan:
    """The plan of a shape; kept for the next call."""
    return _noted(_plan(shape, _place(device), max_block_m))


def sources(layout: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """A table (n, SOURCE) int64 of where keys and values lie; kept for the next call."""
    return _noted(_sources(layout, _place(device)))


def _noted(table):
    for tables in _keepers:
        tables.append(table)
    return table


def _place(device):
    """Device and stream: a table is read in the order of the stream that it was written in."""
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _upload(rows, width, dtype, place) -> torch.Tensor:
    return upload(torch.tensor(rows, dtype=dtype).view(-1, width), place[0])


@functools.lru_cache(maxsize=256)
def _sources(layout, place):
    return _upload(layout, SOURCE, torch.int64, place)


@functools.lru_cache(maxsize=64)
def _plan(shape: Shape, place, max_block_m: int) -> Plan:
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
    used, items, pieces = [0] * shape.n_rows, [], []
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
    """Number, length and rows of each segment that somebody reads."""
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
    """First and end query of rows, and where in them each tile begins, counted in queries times the group."""
    begin, end = shape.starts[rows[0]], shape.starts[rows[1]]
    return [(begin, end, first) for first in range(0, (end - begin) * shape.group, block_m)]


def _parts(chain: _Chain, split: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Cut a chain's keys into parts of at most about `split`."""
    n = -(-chain.keys // split)
    size = -(-chain.keys // n // 16) * 16  # so that blocks of keys stay whole
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
    rows, places = [], []
    for r in range(shape.n_rows):
        n = shape.starts[r + 1] - shape.starts[r]
        rows += [r] * n
        places += range(read[r] - n, read[r])
    return [rows, places]
