"""Keys and values of the frozen decoder, held row by row with room to grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icae_fast.backbone import Backbone
from icae_fast.spans import PackedRows, cumulative


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
        positions = torch.cat([torch.arange(s, e) for s, e in zip(starts, self.lengths, strict=True)])
        base = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * self.capacity
        self._places = (base + positions).to(device)
        self.seqused = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.max_seqlen = max(self.lengths)
        cu = cumulative(counts)
        return PackedRows(
            positions=positions,
            cu_seqlens=cu,
            max_seqlen=max(counts),
            out_rows=cu[1:].to(torch.int64) - 1,
            cu_seqlens_out=torch.arange(len(counts) + 1, dtype=torch.int32),
            max_seqlen_out=1,
        ).to(device)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v (T, Hkv, D) of the announced tokens; gives all keys and values of the layer."""
        self.keys[layer].index_copy_(0, self._places, k)
        self.values[layer].index_copy_(0, self._places, v)
        return self.keys[layer], self.values[layer]

    def copy_row_from(self, prefix: DecoderCache) -> None:
        """Begin every row with what the only row of `prefix` holds."""
        n, rows = prefix.lengths[0], len(self.lengths)
        for mine, theirs in zip((*self.keys, *self.values), (*prefix.keys, *prefix.values), strict=True):
            mine.view(rows, self.capacity, *mine.shape[1:])[:, :n] = theirs[:n]
        self.lengths = [n] * rows
