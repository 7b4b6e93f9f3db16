"""A prefix tree of the frozen decoder's keys and values, with a byte budget and LRU eviction."""

from __future__ import annotations

import hashlib
import threading
from collections import ChainMap, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from icae_fast.backbone.rows import cumulative, pack_behind
from icae_fast.backbone.stack import Backbone
from icae_fast.checks import is_int
from icae_fast.errors import InvalidInputError
from icae_fast.kv.segments import KVSegment, empty_keys
from icae_fast.ops import varlen_attention

DEFAULT_BYTE_BUDGET = 1 << 30

_SAMPLES_PER_TENSOR = 8


@dataclass
class _Row:
    """A row of the forward that computes missing segments: `path[:n_known]` exist, the later ones are computed."""

    path: list[KVSegment]
    n_known: int
    pieces: list[torch.Tensor] = field(default_factory=list)


class SlotKVTree:
    """Keys and values of pieces of decoder input, each computed once and shared by all paths with the same prefix.

    A path is a list of pieces (template, slots of the first span, slots of the second, ...), each a block of input
    embeddings. A node's key is its parent's key and a digest of the piece's bytes, so that the template, memory A, and
    A followed by B share their common prefix. Above the byte budget, the least recently used leaf is evicted.

    Entries belong to the weights that computed them: each call compares dtype, device and a sample of the weights
    (see `weights_key`), and clears the tree if they have changed. All methods are thread-safe; one thread computes at
    a time. Copies and pickles start empty.

    Args:
        backbone: of the frozen decoder.
        byte_budget: the most bytes that are kept; 0 keeps nothing.

    Raises:
        InvalidInputError: the budget is not a whole number of at least 0.
    """

    def __init__(self, backbone: Backbone, byte_budget: int = DEFAULT_BYTE_BUDGET) -> None:
        self.backbone = backbone
        self._lock = threading.RLock()
        # Least recently used first. A path is touched from its end to its start, so a node always stands after its
        # descendants, and the front is always a leaf. Keys are chained from parent to child, so that this ordered
        # dictionary is the whole tree.
        self._kept: OrderedDict[bytes, KVSegment] = OrderedDict()
        self._nbytes = 0
        self._made_with: tuple | None = None
        self.byte_budget = byte_budget

    def __reduce__(self) -> tuple:
        return SlotKVTree, (self.backbone, self.byte_budget)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, at most `byte_budget`."""
        return self._nbytes

    @property
    def byte_budget(self) -> int:
        """The most bytes that are kept; lowering it evicts immediately."""
        return self._byte_budget

    @byte_budget.setter
    def byte_budget(self, n: int) -> None:
        if not is_int(n) or n < 0:
            raise InvalidInputError(f"the byte budget is {n!r}; give a whole number of bytes, 0 to keep nothing")
        with self._lock:
            self._byte_budget = int(n)
            self._evict()

    def clear(self) -> None:
        """Drop all entries; segments in use stay alive as long as they are referenced."""
        with self._lock:
            self._kept.clear()
            self._nbytes = 0

    def path(self, pieces: Sequence[torch.Tensor]) -> list[KVSegment]:
        """Return the segments of consecutive pieces from position 0; see `paths`."""
        return self.paths([pieces])[0]

    def paths(self, paths: Sequence[Sequence[torch.Tensor]]) -> list[list[KVSegment]]:
        """Return the segments of several paths, computing all missing ones in one packed forward.

        A piece that several paths share, behind the same pieces, is computed once. A path larger than the byte budget
        is computed but not kept.

        Args:
            paths: lists of (S_i, d) input embeddings, S_i at least 1, cast to the compute dtype; a list may be empty.

        Returns:
            One segment per piece for each path. Segments are shared: do not write to them.

        Raises:
            InvalidInputError: a piece is empty or has another shape.
        """
        chains = [self._chain(path) for path in paths]
        with self._lock:
            self._forget_other_weights()
            segments = self._read(chains)
        return [[segments[key] for key, _ in chain] for chain in chains]

    def adopt(self, pieces: Sequence[torch.Tensor], segments: Sequence[KVSegment]) -> bool:
        """Adopt segments of a path's last pieces that the same weights computed elsewhere, instead of computing them.

        The tensors are kept without a copy and count against the budget. Earlier pieces are read as by `path`; a piece
        that already has a segment keeps it.

        Args:
            pieces: a path, as in `paths`.
            segments: of its last pieces, at least one, in the compute dtype and on the model's device. Their values
                cannot be checked here.

        Returns:
            Whether the path is kept now. A path larger than the byte budget changes nothing and is computed when read.

        Raises:
            InvalidInputError: bad pieces, or segments of another number, shape, dtype, device or start.
        """
        chain = self._chain(pieces)
        n_before = len(chain) - len(segments)
        if not 0 <= n_before < len(chain):
            raise InvalidInputError(f"{len(segments)} segments for {len(chain)} pieces; give one for each of the last")
        start = sum(len(piece) for _, piece in chain[:n_before])
        for (_, piece), segment in zip(chain[n_before:], segments, strict=True):
            self._check_segment(segment, piece, start)
            start += len(piece)
        with self._lock:
            self._forget_other_weights()
            if start * (segments[0].nbytes // segments[0].length) > self._byte_budget:
                return False
            self._read([chain], {key: s for (key, _), s in zip(chain[n_before:], segments, strict=True)})
            return True

    def _chain(self, path: Sequence[torch.Tensor]) -> list[tuple[bytes, torch.Tensor]]:
        """Return (key, piece) for each piece of a path, cast to the model's dtype and device."""
        weight = self.backbone.embedding
        pieces = [self._checked(p).to(weight) for p in path]
        return list(zip(_chained_keys(pieces), pieces, strict=True))

    def _forget_other_weights(self) -> None:
        weight = self.backbone.embedding
        made_with = (weight.dtype, weight.device, weights_key(self.backbone.view.layers))
        if made_with != self._made_with:
            self.clear()
            self._made_with = made_with

    def _read(self, chains, given: dict[bytes, KVSegment] | None = None) -> dict[bytes, KVSegment]:
        """Return the segments of all chains: kept ones, else given ones, else computed ones."""
        known = ChainMap(self._kept, given or {})
        segments = {key: known[key] for chain in chains for key, _ in chain if key in known}
        rows = self._plan(chains, segments)
        if rows:
            self._compute(rows)
        for chain in chains:
            self._keep([key for key, _ in chain], segments)
        return segments

    def _checked(self, piece: torch.Tensor) -> torch.Tensor:
        d = self.backbone.hidden_size
        tensor = isinstance(piece, torch.Tensor) and piece.is_floating_point()
        if not tensor or piece.dim() != 2 or piece.shape[1] != d or piece.shape[0] == 0:
            what = f"{piece.dtype} {tuple(piece.shape)}" if isinstance(piece, torch.Tensor) else type(piece).__name__
            raise InvalidInputError(f"a piece of a path is {what}; give embeddings of shape (at least 1, {d})")
        return piece.detach()

    def _check_segment(self, segment: KVSegment, piece: torch.Tensor, start: int) -> None:
        shape = (self.backbone.n_layers, len(piece), self.backbone.num_kv_heads, self.backbone.head_dim)
        for name, t in (("keys", segment.keys), ("values", segment.values)):
            found, wanted = (tuple(t.shape), t.dtype, t.device), (shape, piece.dtype, piece.device)
            if found != wanted or t.stride(3) != 1:
                raise InvalidInputError(
                    f"the {name} of a segment are {found[0]} {found[1]} on {found[2]}, but its piece of the path "
                    f"takes {wanted[0]} {wanted[1]} on {wanted[2]}, the head size side by side"
                )
        if segment.start != start:
            raise InvalidInputError(f"a segment starts at position {segment.start}, but its piece at {start}")

    def _plan(self, chains, segments: dict[bytes, KVSegment]) -> list[_Row]:
        """Plan rows that compute all missing segments, and add these to `segments`, allocated but not yet filled.

        The first missing child of a missing node continues its row; further children start rows of their own.
        """
        rows: list[_Row] = []
        ending_with: dict[bytes, _Row] = {}
        for chain in chains:
            path: list[KVSegment] = []
            parent, start = b"", 0
            for key, piece in chain:
                if key not in segments:
                    row = ending_with.pop(parent, None)
                    if row is None:
                        rows.append(row := _Row(list(path), len(path)))
                    segments[key] = self._empty_segment(piece, start)
                    row.path.append(segments[key])
                    row.pieces.append(piece)
                    ending_with[key] = row
                path.append(segments[key])
                parent, start = key, start + len(piece)
        return rows

    @torch.inference_mode(False)  # tensors made in inference mode cannot be used outside of it
    def _empty_segment(self, piece: torch.Tensor, start: int) -> KVSegment:
        keys, values = (empty_keys(self.backbone, len(piece), piece.dtype, piece.device) for _ in range(2))
        return KVSegment(keys, values, start)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self, rows: list[_Row]) -> None:
        x = torch.cat([p for row in rows for p in row.pieces])
        layout = pack_behind([row.path[row.n_known].start for row in rows], [sum(map(len, r.pieces)) for r in rows])
        with torch.autocast(x.device.type, enabled=False):  # results outlive the autocast region
            self.backbone.forward(x, layout.to(x.device), cache=_Recorder(rows, x.device))

    def _keep(self, keys: list[bytes], segments: dict[bytes, KVSegment]) -> None:
        fits = sum(segments[key].nbytes for key in keys) <= self._byte_budget
        for key in reversed(keys):
            if key in self._kept:
                self._kept.move_to_end(key)
            elif fits:
                self._kept[key] = segments[key]
                self._nbytes += segments[key].nbytes
        self._evict()

    def _evict(self) -> None:
        while self._nbytes > self._byte_budget:
            _, segment = self._kept.popitem(last=False)
            self._nbytes -= segment.nbytes


class _Recorder:
    """The backbone's cache while segments are computed: writes K and V into segments and attends over whole rows."""

    def __init__(self, rows: list[_Row], device: torch.device) -> None:
        self._read = [s for row in rows for s in row.path]
        self._written = [s for row in rows for s in row.path[row.n_known :]]
        lengths = [sum(s.length for s in row.path) for row in rows]
        self._cu_seqlens, self._max_seqlen = cumulative(lengths).to(device), max(lengths)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, scale: float,
        window: int,
    ) -> torch.Tensor:  # fmt: skip
        """See `icae_fast.backbone.stack.KeyValueCache`."""
        lengths = [s.length for s in self._written]
        for segment, its_k, its_v in zip(self._written, k.split(lengths), v.split(lengths), strict=True):
            segment.keys[layer] = its_k
            segment.values[layer] = its_v
        if len(self._read) > len(self._written):
            k = torch.cat([s.keys[layer] for s in self._read])
            v = torch.cat([s.values[layer] for s in self._read])
        n = self._max_seqlen
        return varlen_attention(q, k, v, cu_seqlens_q, self._cu_seqlens, n, n, scale=scale, window=window)[0]


def _chained_keys(pieces: Sequence[torch.Tensor]) -> list[bytes]:
    """Return each piece's key: a digest of its parent's key, its shape and its bytes."""
    keys, parent = [], b""
    for piece in pieces:
        digest = hashlib.blake2b(parent, digest_size=16)
        digest.update(str(tuple(piece.shape)).encode())
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
        keys.append(parent := digest.digest())
    return keys


def weights_key(layers: nn.Module) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    """Return a cheap, best-effort key that changes when the weights change.

    The key holds the version counter of every parameter, which all writes through the parameter increment
    (`load_state_dict`, optimizers, `add_`), and 8 or more evenly spaced values of each, which change with other
    weights assigned through `.data` or a new `Parameter`. A write through `.data` that misses these values is not
    detected.
    """
    versions: list[int] = []
    samples: dict[torch.dtype, list[torch.Tensor]] = {}
    for p in layers.parameters():
        versions.append(0 if p.is_inference() else p._version)
        step = max(1, p.numel() // _SAMPLES_PER_TENSOR)
        samples.setdefault(p.dtype, []).append(p.detach().reshape(-1)[::step])
    read = [torch.cat(s).cpu().view(torch.uint8).numpy().tobytes() for s in samples.values()]
    return tuple(versions), tuple(read)
