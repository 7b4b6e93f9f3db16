"""The frozen decoder over a batch of rows, one token a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from icae_fast.cache import DecoderCache

if TYPE_CHECKING:
    from icae_fast.modeling import ICAE


class DecodeSession:
    """Rows that the frozen decoder continues, each behind a prefix that it may share with others.

    Each prefix (a template and a memory's slots) is read once, however many rows stand behind it. Call `start`, and
    then `step` with a token for every row that is still active; `keep` takes rows out.

    Args:
        icae: the model.
        prefixes: (P_i, d) embeddings in the model's dtype, P_i at least 1.
        prefix_of_row: the prefix, by its place in `prefixes`, of each row.
        suffixes: (S_j, d) embeddings of each row behind its prefix, at least one token each.
        max_new_tokens: the most tokens that a row gets; gives the room that is reserved.
    """

    def __init__(
        self,
        icae: ICAE,
        prefixes: Sequence[torch.Tensor],
        prefix_of_row: Sequence[int],
        suffixes: Sequence[torch.Tensor],
        max_new_tokens: int,
    ) -> None:
        self._icae = icae
        self._prefixes, self._prefix_of_row, self._suffixes = prefixes, prefix_of_row, suffixes
        longest = max(len(prefixes[p]) + len(s) for p, s in zip(prefix_of_row, suffixes, strict=True))
        self._cache = DecoderCache(icae.backbone, len(suffixes), longest + max_new_tokens, icae.dtype, icae.device)

    @torch.no_grad()
    def start(self) -> torch.Tensor:
        """Read prefixes and suffixes; gives the (rows, vocabulary) logits of each row's first new token.

        They are in the model's dtype and the caller's to overwrite, here and in `step`.
        """
        icae, lengths = self._icae, [len(p) for p in self._prefixes]
        shared = DecoderCache(icae.backbone, len(lengths), max(lengths), icae.dtype, icae.device)
        icae.backbone.forward(torch.cat(list(self._prefixes)), shared.append(lengths), cache=shared)
        self._cache.copy_rows_from(shared, self._prefix_of_row)
        return self._forward(torch.cat(list(self._suffixes)), [len(s) for s in self._suffixes])

    @torch.no_grad()
    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Give every active row a token; gives the logits of its next one.

        Args:
            token_ids: (active rows,) int64 on the model's device, in the rows' order.

        Returns:
            (active rows, vocabulary).
        """
        return self._forward(self._icae.embed(token_ids), [1] * len(token_ids))

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with some of the active rows, given by their places among those in rising order; nothing is copied."""
        self._cache.keep(indices)

    def _forward(self, embeddings: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        hidden = self._icae.backbone.forward(embeddings, self._cache.append(counts), cache=self._cache)
        return self._icae.base_model.lm_head(hidden)
