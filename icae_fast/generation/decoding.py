"""Prefill of prompts behind memories, and token steps, for a batch of rows.

Token selection happens elsewhere, except that `DecodeSession.greedy` takes the argmax.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from icae_fast.backbone.modes import in_own_modes
from icae_fast.generation.graphs import StepGraph, capture_on
from icae_fast.generation.step_weights import step_cache, step_weights
from icae_fast.kv.segments import DecoderRows, KVSegment, tree_order
from icae_fast.ops import BoundStep, StepWeights, bind_decode_step, decode_step

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore


class DecodeSession:
    """Rows that decode together: each reads shared segments, then its own suffix, then its new tokens.

    Segments that rows share are read once for all of them. A step is one call of the op `decode_step` where that op
    computes the model (see `step_weights`), and otherwise a forward of the backbone. On CUDA, the steps of a fixed
    set of rows are one CUDA graph.

    Args:
        core: the model, whose frozen decoder runs.
        paths: the segments that each row reads first, in order; rows may share them.
        suffixes: (S_r, d) embeddings of each row behind its segments, at least one.
        max_new_tokens: the most steps.
    """

    def __init__(
        self,
        core: ICAECore,
        paths: Sequence[Sequence[KVSegment]],
        suffixes: Sequence[torch.Tensor],
        max_new_tokens: int,
    ) -> None:
        self._core = core
        # Rows that share segments become neighbours; callers see their own order.
        self._order = tree_order(paths)
        self._suffixes = [suffixes[r] for r in self._order]
        self._rows = DecoderRows(
            core.backbone, [paths[r] for r in self._order], [len(s) + max_new_tokens for s in self._suffixes],
            core.dtype, core.device,
        )  # fmt: skip
        self._weights = step_weights(core.backbone)
        longest = max(p + c for p, c in zip(self._rows.prefix_lengths, self._rows.capacities, strict=True))
        # Rows have capacity for the most new tokens of any row, but none passes the model's positions.
        limit = core.backbone.view.rope_limit
        longest = longest if limit is None else min(longest, max(limit, core.max_positions))
        # Cosines and sines (positions, D / 2) of every position that the rows can reach.
        self._tables = core.backbone.rotary_tables(torch.arange(longest, device=core.device), suffixes[0])
        self._graph: StepGraph | None = None
        self._capture = None if self._weights is None else capture_on(core.device)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._core.device

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, with each shared segment counted once."""
        return self._rows.nbytes

    @in_own_modes
    @torch.no_grad()
    def start(self) -> torch.Tensor:
        """Read all suffixes and return the (R, V) logits of each row's first new token."""
        counts = [len(s) for s in self._suffixes]
        hidden = self._core.backbone.forward(torch.cat(self._suffixes), self._rows.append(counts), cache=self._rows)
        self._suffixes = []
        return self._in_callers_order(self._core.base_model.lm_head(hidden))

    @in_own_modes
    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one token per row and return the (R, V) logits of the next one.

        Args:
            tokens: (R,) int64 ids of base tokens, in the order of the remaining rows.
        """
        if self._capture is not None:
            return self._graph_step(tokens)
        tokens = self._in_own_order(tokens)
        if self._weights is None:
            packed = self._rows.append([1] * len(self._order))
            hidden = self._core.backbone.forward(self._core.embed(tokens), packed, cache=self._rows)
            return self._in_callers_order(self._core.base_model.lm_head(hidden))
        return self._in_callers_order(self._bound.step(tokens, self._rows.append_each()))

    @property
    def runs_ahead(self) -> bool:
        """Whether `greedy` can be called: a step is one call of the op, outside of a graph."""
        return self._capture is None and self._weights is not None

    @in_own_modes
    @torch.no_grad()
    def greedy(self, tokens: torch.Tensor, most: int, eos: Sequence[int], least: int) -> torch.Tensor:
        """Read one token per row and continue with the argmax for several steps in one call.

        Args:
            tokens: see `step`.
            most: the most steps; every row must have the capacity.
            eos: ids that end the call when any row yields one.
            least: number of first steps that may not yield an id of `eos`.

        Returns:
            (n, R) tokens of the n steps made; the last ones have not been read yet.
        """
        chosen = self._bound.greedy(self._in_own_order(tokens), self._rows.append_each(), most, list(eos), least)
        self._rows.append_each(len(chosen) - 1)
        return self._in_callers_order(chosen.T).T

    @functools.cached_property
    def _bound(self) -> BoundStep:
        """The step bound to the remaining rows."""
        weights = self._weights
        assert weights is not None
        return bind_decode_step(weights, *self._tables, step_cache(self._rows), self._rows.starts)

    def _graph_step(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self._rows
        if self._graph is None:
            weights, capture = self._weights, self._capture
            assert weights is not None
            assert capture is not None
            starts, lengths = rows.tails  # each step increments the lengths on the device
            # `compute` holds no reference to the session, so that the session is freed with its last user.
            compute = functools.partial(_compute, weights, rows, starts, lengths)
            positions = [p + n for p, n in zip(rows.prefix_lengths, rows.lengths, strict=True)]
            self._graph = StepGraph(compute, self._tables, positions, lengths, self._order, capture)
        rows.append_each()
        return self._graph.step(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, given by ascending index among the remaining rows."""
        wanted = {row: place for place, row in enumerate(rows)}
        kept = [i for i, row in enumerate(self._order) if row in wanted]
        self._order = [wanted[self._order[i]] for i in kept]
        self._rows.keep(kept)
        self._graph = None
        self.__dict__.pop("_bound", None)

    @property
    def _permuted(self) -> bool:
        return self._order != list(range(len(self._order)))

    def _in_own_order(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[torch.tensor(self._order, device=tokens.device)] if self._permuted else tokens

    def _in_callers_order(self, logits: torch.Tensor) -> torch.Tensor:
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
