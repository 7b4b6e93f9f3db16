"""The encoder-only warm start: slots learn what their share of the text is before any decoder reads them.

Restoration alone gives a new adapter nothing to go by: on SmolLM2, hundreds of steps of it leave the slots unused.
This gives each slot a direct target, at the price of no decoder:

    target_i = mean of the embeddings of tokens floor(i * L / k) .. floor((i + 1) * L / k) - 1 of the span
    loss_i = -log softmax_j(10 * cos(slot_i, target_j))[i] + c * (1 - cos(slot_i, target_i))

for slot i of k over a span of L tokens, j over the span's targets, with c = 1. An empty share (L < k) takes the token
that it lies in. Where a slot code has been learned before (`icae_fast.training.methods.slot_code`), its slots are the
targets, and c = 4:
what the decoder reads is worth more than to be told from its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from icae_fast import ICAE
from icae_fast.core.spans import slots_per_span, span_lengths
from icae_fast.errors import InvalidInputError

if TYPE_CHECKING:
    from icae_fast.training.methods.slot_code import SlotCode

SHARPNESS = 10.0  # of the contrast: the factor of cosine similarities before the softmax
CLOSENESS, CLOSENESS_TO_CODE = 1.0, 4.0


class WarmStart(NamedTuple):
    """What `warm_start_loss` gives.

    Args:
        loss: () sum of the losses of all slots, fp32 (fp64 for fp64 slots), with a graph.
        n_slots: how many those are.
        n_right: () int64, for how many no target of their span is more alike than their own.
    """

    loss: torch.Tensor
    n_slots: int
    n_right: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Contrast accuracy, from 0 to 1. Reads it back from the device."""
        return int(self.n_right) / self.n_slots


def warm_start_loss(
    icae: ICAE,
    contexts: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
    memory_size: int | None = None,
    code: SlotCode | None = None,
) -> WarmStart:
    """The warm start's loss, see the head of this file; computed in fp32 (fp64 for fp64 slots), whatever autocast says.

    Args:
        icae: the model whose token embeddings are the targets.
        contexts: (L_i,) int64 ids of base tokens.
        slots: (n_spans_i * k', d) of each, as `icae.encode(contexts, memory_size=memory_size)` gives them.
        memory_size: k', the adapter's k by default.
        code: gives the targets, in place of mean embeddings.

    Raises:
        InvalidInputError: no context, an empty one, or as many slots as its spans do not have.
    """
    k = slots_per_span(icae.config, memory_size)
    lengths = [span_lengths(len(ids), icae.config) for ids in contexts]
    if not lengths or len(slots) != len(lengths):
        raise InvalidInputError(f"there are {len(lengths)} contexts and {len(slots)} rows of slots; give one for each")
    for i, (own, row) in enumerate(zip(lengths, slots, strict=True)):
        if not own or len(row) != len(own) * k:
            raise InvalidInputError(
                f"context {i} has {len(own)} spans of {k} slots, but {len(row)} slots are given; give at least one "
                "token, and the memory_size that it was encoded with"
            )
    ids, of_spans = torch.cat(list(contexts)), [n for own in lengths for n in own]
    if code is None:
        targets, closeness = share_means(icae, ids, of_spans, k), CLOSENESS
    else:
        with torch.no_grad():
            targets, closeness = code(icae, ids, of_spans, k), CLOSENESS_TO_CODE
    found = torch.cat(list(slots))
    with torch.autocast(found.device.type, enabled=False):  # which would compute similarities in its narrow dtype
        found = F.normalize(found.to(targets.dtype).unflatten(0, (-1, k)), dim=-1)
        similarities = found @ F.normalize(targets, dim=-1).transpose(1, 2)
        labels = torch.arange(k, device=found.device).repeat(len(targets))
        contrast = F.cross_entropy(SHARPNESS * similarities.flatten(0, 1), labels, reduction="sum")
        loss = contrast + closeness * (1 - similarities.diagonal(dim1=1, dim2=2)).sum()
    # A token that stands twice gives equal targets: either is right.
    nearest = targets.take_along_dim(similarities.detach().argmax(-1)[..., None], dim=1)
    return WarmStart(loss, found.shape[0] * k, (nearest == targets).all(-1).sum())


def share_starts(length: torch.Tensor, memory_size: int) -> torch.Tensor:
    """Where the share of each slot begins in its span, `floor(i * L / k)`.

    Args:
        length: (spans,) int64, L of each.
        memory_size: k.

    Returns:
        (spans, k + 1) int64; the last one is L.
    """
    return torch.arange(memory_size + 1) * length[:, None] // memory_size


@torch.no_grad()
def share_means(icae: ICAE, ids: torch.Tensor, lengths: Sequence[int], memory_size: int) -> torch.Tensor:
    """The mean embedding of each slot's share of its span.

    Args:
        icae: gives embeddings.
        ids: (sum of lengths,) int64, all spans one behind the other.
        lengths: L of each span, at least 1.
        memory_size: k, shares of a span.

    Returns:
        (spans, k, d) fp32, or fp64 for a model in fp64.
    """
    length = torch.tensor(lengths)
    edges = share_starts(length, memory_size)
    start = (edges[:, :-1] + (length.cumsum(0) - length)[:, None]).flatten()
    count = edges.diff(dim=1).clamp_min(1).flatten()
    # Tokens of all shares one behind the other: a running number, shifted so that each share begins at its start.
    tokens = torch.arange(int(count.sum())) + (start - count.cumsum(0) + count).repeat_interleave(count)
    embeddings = icae.embed(ids[tokens.to(ids.device)])
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    means = torch.segment_reduce(wide, "mean", lengths=count.to(wide.device))
    return means.unflatten(0, (len(lengths), memory_size))
