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
        self._blocks = list(range(n_rows))  # where each row lies, in units of the capacity; rising
        self._n_blocks = n_rows
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
        base = torch.tensor(self._blocks).repeat_interleave(torch.tensor(counts)) * self.capacity
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
        first = self._blocks[0] * self.capacity  # `cu_seqlens` counts from the first row that is left
        return self.keys[layer][first:], self.values[layer][first:]

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with some of the rows, given by their places in rising order; the others' room lies idle."""
        self._blocks = [self._blocks[i] for i in indices]
        self.lengths = [self.lengths[i] for i in indices]
        starts = torch.tensor([*self._blocks, self._n_blocks], dtype=torch.int32) - self._blocks[0]
        self.cu_seqlens = (starts * self.capacity).to(self.cu_seqlens.device)

    def copy_rows_from(self, prefixes: DecoderCache, prefix_of_row: Sequence[int]) -> None:
        """Begin row i with what row `prefix_of_row[i]` of another cache holds."""
        followers: dict[int, list[int]] = {}
        for row, prefix in enumerate(prefix_of_row):
            followers.setdefault(prefix, []).append(row)
        for mine, theirs in zip((*self.keys, *self.values), (*prefixes.keys, *prefixes.values), strict=True):
            mine = mine.view(self._n_blocks, self.capacity, *mine.shape[1:])
            theirs = theirs.view(prefixes._n_blocks, prefixes.capacity, *theirs.shape[1:])
            for prefix, rows in followers.items():
                mine[rows, : prefixes.lengths[prefix]] = theirs[prefix, : prefixes.lengths[prefix]]
        self.lengths = [prefixes.lengths[prefix] for prefix in prefix_of_row]
