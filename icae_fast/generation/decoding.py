"""Reading prompts behind memories and decoding on, a batch of rows at a time.

Which tokens are chosen is not decided here, but that `DecodeSession.greedy` goes on with the most likely ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from icae_fast.generation.graphs import StepGraph, capture_on
from icae_fast.generation.step_weights import RotaryTables, step_cache, step_weights
from icae_fast.kv.segments import DecoderRows, KVSegment, tree_order
from icae_fast.ops import BoundStep, StepWeights, bind_decode_step, decode_step

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore


class DecodeSession:
    """Rows that are decoded together: each reads shared segments and then a suffix of its own, and goes on from there.

    Where rows share segments, these are read once for all of them. A step is one call of the op `decode_step`
    where it computes the model (see `step_weights`), and else a forward of the backbone. On CUDA, steps of the same
    rows are one CUDA graph.

    Args:
        core: the model, whose frozen decoder runs.
        paths: the segments that each row reads first, in order; rows may share them.
        suffixes: (S_r, d) embeddings that each row reads behind them, at least one.
        max_new_tokens: steps that will be made at most.
    """

    def __init__(
        self,
        core: ICAECore,
        paths: Sequence[Sequence[KVSegment]],
        suffixes: Sequence[torch.Tensor],
        max_new_tokens: int,
    ) -> None:
        self._core = core
        # Rows that share segments become neighbours; callers go on seeing their own order.
        self._order = tree_order(paths)
        self._suffixes = [suffixes[r] for r in self._order]
        self._rows = DecoderRows(
            core.backbone, [paths[r] for r in self._order], [len(s) + max_new_tokens for s in self._suffixes],
            core.dtype, core.device,
        )  # fmt: skip
        self._weights = step_weights(core.backbone)
        longest = max(p + c for p, c in zip(self._rows.prefix_lengths, self._rows.capacities, strict=True))
        self._tables = RotaryTables(core.backbone, longest, suffixes[0])
        self._graph: StepGraph | None = None
        self._capture = None if self._weights is None or self._tables.fixed is None else capture_on(core.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, each shared segment counted once."""
        return self._rows.nbytes

    @torch.no_grad()
    def start(self) -> torch.Tensor:
        """Read all suffixes; gives (R, V) logits of each row's first new token."""
        counts = [len(s) for s in self._suffixes]
        hidden = self._core.backbone.forward(torch.cat(self._suffixes), self._rows.append(counts), cache=self._rows)
        self._suffixes = []
        return self._in_callers_order(self._core.base_model.lm_head(hidden))

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one more token a row; gives (R, V) logits of the next one.

        Args:
            tokens: (R,) int64 ids of base tokens, in the order of the rows that are left.
        """
        if self._capture is not None:
            return self._graph_step(tokens)
        tokens = self._in_own_order(tokens)
        if self._weights is None:
            packed = self._rows.append([1] * len(self._order))
            hidden = self._core.backbone.forward(self._core.embed(tokens), packed, cache=self._rows)
            return self._in_callers_order(self._core.base_model.lm_head(hidden))
        if self._tables.fixed is None:
            return self._in_callers_order(self._unbound_step(tokens))
        return self._in_callers_order(self._bound.step(tokens, self._rows.append_each()))

    @property
    def runs_ahead(self) -> bool:
        """Whether `greedy` can be called: one call of the op is a step, and it is no part of a graph."""
        return self._capture is None and self._weights is not None and self._tables.fixed is not None

    @torch.no_grad()
    def greedy(self, tokens: torch.Tensor, most: int, eos: Sequence[int], least: int) -> torch.Tensor:
        """Read one more token a row and go on with the most likely ones, without coming back for each.

        Args:
            tokens: see `step`.
            most: steps at most, for which every row has room.
            eos: ids after which no further step is made, whatever row they come in.
            least: steps that give none of `eos`.

        Returns:
            (n, R) the tokens of the n steps that were made; the last ones have not been read yet.
        """
        chosen = self._bound.greedy(self._in_own_order(tokens), self._rows.append_each(), most, list(eos), least)
        self._rows.append_each(len(chosen) - 1)
        return self._in_callers_order(chosen.T).T

    @functools.cached_property
    def _bound(self) -> BoundStep:
        """A step of the rows that are left."""
        return bind_decode_step(self._weights, *self._tables.fixed, step_cache(self._rows), self._rows.starts)

    def _unbound_step(self, tokens):
        """A step at angles that depend on how long the rows have become."""
        rows = self._rows
        lengths = rows.append_each()
        cos, sin = self._tables.at([p + n - 1 for p, n in zip(rows.prefix_lengths, lengths, strict=True)])
        return _compute(self._weights, rows, *rows.tails, tokens, cos, sin)

    def _graph_step(self, tokens):
        rows = self._rows
        if self._graph is None:
            starts, lengths = rows.tails  # each step raises the lengths by itself, on the device
            # Without a reference to the session, so that its memory is free as soon as nobody holds it.
            compute = functools.partial(_compute, self._weights, rows, starts, lengths)
            positions = [p + n for p, n in zip(rows.prefix_lengths, rows.lengths, strict=True)]
            self._graph = StepGraph(compute, self._tables.fixed, positions, lengths, self._order, self._capture)
        rows.append_each()
        return self._graph.step(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, given by their places among those that are left, in rising order."""
        wanted = {row: place for place, row in enumerate(rows)}
        kept = [i for i, row in enumerate(self._order) if row in wanted]
        self._order = [wanted[self._order[i]] for i in kept]
        self._rows.keep(kept)
        self._graph = None
        self.__dict__.pop("_bound", None)

    @property
    def _permuted(self) -> bool:
        return self._order != list(range(len(self._order)))

    def _in_own_order(self, tokens):
        return tokens[torch.tensor(self._order, device=tokens.device)] if self._permuted else tokens

    def _in_callers_order(self, logits):
        if not self._permuted:
            return logits
        out = torch.empty_like(logits)
        out[torch.tensor(self._order, device=logits.device)] = logits
        return out


def _compute(
    weights: StepWeights, rows: DecoderRows, tail_starts: torch.Tensor, tail_lengths: torch.Tensor,
    tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return (R, V) logits behind one token of each row, in the order of the rows."""
    return decode_step(tokens, weights, cos, sin, step_cache(rows), tail_starts, tail_lengths)
