"""Keys and values of the frozen decoder, held row by row with room to grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icae_fast.backbone import Backbone
from icae_fast.spans import PackedRows, pack_behind


@dataclass(frozen=True, eq=False)
class KVSegment:
    """Keys and values that the frozen decoder computed for a piece of its input, in all layers.

    Args:
        keys: (n_layers, S, Hkv, D) contiguous, in the model's dtype, RoPE applied at positions `start .. start + S`.
        values: (n_layers, S, Hkv, D) contiguous.
        start: position of the first token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: int

    @property
    def length(self) -> int:
        """S, the positions that the piece takes."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


class DecoderCache:
    """A key/value cache of `n_rows` rows with room for `capacity` tokens each.

    A step first announces how many tokens each row gets, `rows = cache.append([...])`, and then runs
    `backbone.forward(x, rows, cache=cache)`.

    Args:
        backbone: gives the number of layers and the head shapes.
        n_rows: rows.
        capacity: tokens that each row can hold.
        dtype, device: of the keys and values.
    """

    def __init__(
        self, backbone: Backbone, n_rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (n_rows * capacity, backbone.num_kv_heads, backbone.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(backbone.n_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(backbone.n_layers)]
        self.capacity, self.lengths = capacity, [0] * n_rows
        self.cu_seqlens = torch.arange(n_rows + 1, dtype=torch.int32, device=device) * capacity
        self.seqused = torch.zeros(n_rows, dtype=torch.int32, device=device)
        self.max_seqlen = 0
        self._places = torch.empty(0, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, the room to grow included."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def append(self, counts: Sequence[int]) -> PackedRows:
        """Announce `counts[i]` more tokens for row i; gives their layout, asking for each row's last hidden state."""
        device = self.seqused.device
        starts = self.lengths
        self.lengths = [start + n for start, n in zip(starts, counts, strict=True)]
        if max(self.lengths) > self.capacity:
            raise ValueError(f"a row of {max(self.lengths)} tokens does not fit into a cache of {self.capacity}")
        rows = pack_behind(starts, counts)
        base = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * self.capacity
        self._places = (base + rows.positions).to(device)
        self.seqused = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.max_seqlen = max(self.lengths)
        return rows.to(device)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v (T, Hkv, D) of the announced tokens; gives all keys and values of the layer."""
        self.keys[layer].index_copy_(0, self._places, k)
        self.values[layer].index_copy_(0, self._places, v)
        return self.keys[layer], self.values[layer]

    def begin_with(self, segments: Sequence[KVSegment]) -> None:
        """Begin every row with the keys and values of `segments`, one behind the other from position 0."""
        rows, end = len(self.lengths), 0
        for segment in segments:
            start, end = end, end + segment.length
            sources = (*segment.keys, *segment.values)
            for mine, theirs in zip((*self.keys, *self.values), sources, strict=True):
                mine.view(rows, self.capacity, *mine.shape[1:])[:, start:end] = theirs
        self.lengths = [end] * rows
