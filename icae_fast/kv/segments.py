"""Keys and values of the frozen decoder: shared segments, and rows that continue behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from icae_fast.backbone.rows import PackedRows, pack_behind
from icae_fast.backbone.stack import Backbone
from icae_fast.ops import shared_prefix_attention


def empty_keys(backbone: Backbone, n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate n keys or values, (layers, n, Hkv, D), with each head's contiguous in memory, as kernels read them."""
    return torch.empty(
        (backbone.n_layers, backbone.num_kv_heads, n, backbone.head_dim), dtype=dtype, device=device
    ).transpose(1, 2)


def joined(keys: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate keys or values (layers, n_i, Hkv, D) along positions, in the layout of `empty_keys`."""
    return torch.cat([k.transpose(1, 2) for k in keys], 2).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class KVSegment:
    """Keys and values of one piece of the frozen decoder's input, in all layers.

    Args:
        keys: (n_layers, S, Hkv, D) in the compute dtype, with RoPE at positions `start .. start + S`, in the layout of
            `empty_keys` or a range of positions of such a tensor.
        values: (n_layers, S, Hkv, D), likewise.
        start: position of the first token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: int

    @property
    def length(self) -> int:
        """S, the number of positions of the piece."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, eq=False)
class SharedSegments:
    """The segments of a batch of rows in depth-first order, with the range of rows that read each.

    Args:
        segments: each segment once, after the segments that precede it in a row.
        rows: (first row, last row + 1) of each segment.
    """

    segments: tuple[KVSegment, ...]
    rows: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, paths: Sequence[Sequence[KVSegment]]) -> SharedSegments:
        """Find the segments that neighbouring rows share, given the segments that each row reads."""
        segments, ranges = [], []

        def visit(begin: int, end: int, depth: int) -> None:
            row = begin
            while row < end:
                first = row
                segment = paths[row][depth] if depth < len(paths[row]) else None
                while row < end and (paths[row][depth] if depth < len(paths[row]) else None) is segment:
                    row += 1
                if segment is not None:
                    segments.append(segment)
                    ranges.append((first, row))
                    visit(first, row, depth + 1)

        visit(0, len(paths), 0)
        return cls(tuple(segments), tuple(ranges))


def tree_order(paths: Sequence[Sequence[KVSegment]]) -> list[int]:
    """Return an order of rows in which rows that share segments are neighbours, and otherwise keep the order."""
    seen: dict[int, int] = {}
    for path in paths:
        for segment in path:
            seen.setdefault(id(segment), len(seen))
    return sorted(range(len(paths)), key=lambda row: [seen[id(segment)] for segment in paths[row]])


class DecoderRows:
    """A batch of decoder rows with the keys and values of everything they have read.

    Args:
        backbone: of the frozen decoder.
        paths: the segments that each row has read; rows that share segments must be neighbours (`tree_order`).
        capacities: the most tokens that may be appended to each row.
        dtype, device: of the keys and values.
    """

    def __init__(
        self, backbone: Backbone, paths: Sequence[Sequence[KVSegment]], capacities: Sequence[int], dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.keys, self.values = (empty_keys(backbone, sum(capacities), dtype, device) for _ in range(2))
        self.paths, self.capacities = [list(p) for p in paths], list(capacities)
        self.prefix_lengths = [sum(s.length for s in p) for p in paths]
        self.starts = [0, *accumulate(capacities)][:-1]
        self.lengths = [0] * len(self.starts)
        self.shared = SharedSegments.of(self.paths)
        self._tails: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Device of keys and values."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, with each shared segment counted once and unused capacity included."""
        return self.keys.nbytes + self.values.nbytes + sum(s.nbytes for s in self.shared.segments)

    @property
    def tails(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Start and length of each row's own keys (its tail), (R,) int32 each."""
        if self._tails is None:
            starts, lengths = (
                torch.tensor(v, dtype=torch.int32, device=self.device) for v in (self.starts, self.lengths)
            )
            self._tails = starts, lengths
        return self._tails

    def _announce(self, counts: Sequence[int]) -> None:
        lengths = [n + more for n, more in zip(self.lengths, counts, strict=True)]
        for n, capacity in zip(lengths, self.capacities, strict=True):
            if n > capacity:
                raise ValueError(f"a row of {n} tokens exceeds its capacity of {capacity}")
        self.lengths, self._tails = lengths, None

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, given by ascending index."""
        for name in ("paths", "capacities", "prefix_lengths", "starts", "lengths"):
            values = getattr(self, name)
            setattr(self, name, [values[i] for i in rows])
        self.shared = SharedSegments.of(self.paths)
        self._tails = None

    def tail(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy a row's own keys and values (layers, n, Hkv, D), for use as a segment of other rows."""
        start, n = self.starts[row], self.lengths[row]
        keys, values = (joined([t[:, start : start + n]]) for t in (self.keys, self.values))
        return keys, values

    def append(self, counts: Sequence[int]) -> PackedRows:
        """Announce `counts[i]` more tokens for row i and return their layout, with each row's last hidden state only.

        Raises:
            ValueError: a row's capacity is exceeded.
        """
        before = self.lengths
        self._announce(counts)
        places = [torch.arange(s + n, s + n + c) for s, n, c in zip(self.starts, before, counts, strict=True)]
        self._places = torch.cat(places).to(self.device)
        return pack_behind([p + n for p, n in zip(self.prefix_lengths, before, strict=True)], counts).to(self.device)

    def append_each(self, count: int = 1) -> list[int]:
        """Announce `count` more tokens for every row and return the new lengths.

        Raises:
            ValueError: a row's capacity is exceeded.
        """
        self._announce([count] * len(self.lengths))
        return self.lengths

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, scale: float,
        window: int,
    ) -> torch.Tensor:  # fmt: skip
        """Write k and v (T, Hkv, D) of the announced tokens, and attend to everything that their rows have read.

        Args:
            layer: index of the layer.
            q: (Tq, Hq, D) queries, the last ones of each row.
            k, v: (T, Hkv, D).
            cu_seqlens_q: (R + 1,) int32, start of each row's queries.
            scale, window: see `icae_fast.ops.shared_prefix_attention`.

        Returns:
            (Tq, Hq, D).
        """
        self.keys[layer].index_copy_(0, self._places, k)
        self.values[layer].index_copy_(0, self._places, v)
        return shared_prefix_attention(
            q, self.keys[layer], self.values[layer], cu_seqlens_q, *self.tails,
            [s.keys[layer] for s in self.shared.segments], [s.values[layer] for s in self.shared.segments],
            self.shared.rows, scale=scale, window=window,
        )  # fmt: skip
