"""The encoder-only warm start: slots learn the content of their share of the text before a decoder reads them.

Restoration alone does not guide a new adapter: on SmolLM2, hundreds of steps of it leave the slots unused. The warm
start has a direct target for each slot, without running a decoder:

    target_i = mean of the embeddings of tokens floor(i * L / k) .. floor((i + 1) * L / k) - 1 of the span
    loss_i = -log softmax_j(10 * cos(slot_i, target_j))[i] + c * (1 - cos(slot_i, target_i))

for slot i of k over a span of L tokens, j over the span's targets, with c = 1. An empty share (L < k) has the token at
its position. After a stage of slot code (`icae_fast.training.methods.slot_code`), its slots are the targets, and c = 4:
matching the decoder's input matters more than contrast with the neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from icae_fast.core.core import ICAECore
from icae_fast.core.spans import slots_per_span, span_lengths
from icae_fast.errors import InvalidInputError
from icae_fast.training.methods.slot_code import SlotCode, share_starts

SHARPNESS = 10.0  # factor of cosine similarities before the softmax
CLOSENESS, CLOSENESS_TO_CODE = 1.0, 4.0


class WarmStart(NamedTuple):
    """Result of `warm_start_loss`.

    Args:
        loss: () sum of the losses of all slots, fp32 (fp64 for fp64 slots), with a graph.
        n_slots: number of slots.
        n_right: () int64, number of slots whose most similar target in the span is their own.
    """

    loss: torch.Tensor
    n_slots: int
    n_right: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Contrast accuracy, 0 to 1. Synchronises with the device."""
        return int(self.n_right) / self.n_slots


def warm_start_loss(
    icae: ICAECore,
    contexts: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
    memory_size: int | None = None,
    code: SlotCode | None = None,
) -> WarmStart:
    """Return the warm start's loss, computed in fp32 (fp64 for fp64 slots) even under autocast.

    Args:
        icae: the model, whose token embeddings are the targets.
        contexts: (L_i,) int64 ids of base tokens, on any device.
        slots: (n_spans_i * k', d) of each context, from `icae.encode(contexts, memory_size=memory_size)`.
        memory_size: k', default the adapter's k.
        code: slot code that makes the targets, default None: mean embeddings.

    Raises:
        InvalidInputError: there is no context, one is empty, or the number of slots does not match its spans.
    """
    k = slots_per_span(icae.config, memory_size)
    lengths = [span_lengths(len(ids), icae.config) for ids in contexts]
    if not lengths or len(slots) != len(lengths):
        raise InvalidInputError(
            f"there are {len(lengths)} contexts and {len(slots)} rows of slots; give one row per context"
        )
    for i, (own, row) in enumerate(zip(lengths, slots, strict=True)):
        if not own or len(row) != len(own) * k:
            raise InvalidInputError(
                f"context {i} has {len(own)} spans of {k} slots, but {len(row)} slots are given; give at least one "
                "token, and the memory_size of its encoding"
            )
    ids, of_spans = torch.cat(list(contexts)), [n for own in lengths for n in own]
    if code is None:
        targets, closeness = share_means(icae, ids, of_spans, k), CLOSENESS
    else:
        with torch.no_grad():
            targets, closeness = code(icae, ids, of_spans, k), CLOSENESS_TO_CODE
    found = torch.cat(list(slots))
    with torch.autocast(found.device.type, enabled=False):  # autocast would compute similarities in a narrow dtype
        found = F.normalize(found.to(targets.dtype).unflatten(0, (-1, k)), dim=-1)
        similarities = found @ F.normalize(targets, dim=-1).transpose(1, 2)
        labels = torch.arange(k, device=found.device).repeat(len(targets))
        contrast = F.cross_entropy(SHARPNESS * similarities.flatten(0, 1), labels, reduction="sum")
        loss = contrast + closeness * (1 - similarities.diagonal(dim1=1, dim2=2)).sum()
    # A repeated token makes equal targets: either one is right.
    nearest = targets.take_along_dim(similarities.detach().argmax(-1)[..., None], dim=1)
    return WarmStart(loss, found.shape[0] * k, (nearest == targets).all(-1).sum())


@torch.no_grad()
def share_means(icae: ICAECore, ids: torch.Tensor, lengths: Sequence[int], memory_size: int) -> torch.Tensor:
    """Return the mean embedding of each slot's share of its span.

    Args:
        icae: the model, for its embeddings.
        ids: (sum of lengths,) int64 ids of all spans, concatenated, on any device.
        lengths: L of each span, at least 1.
        memory_size: k, shares of a span.

    Returns:
        (spans, k, d) fp32, or fp64 for a model in fp64.
    """
    length = torch.tensor(lengths)
    edges = share_starts(length, memory_size)
    start = (edges[:, :-1] + (length.cumsum(0) - length)[:, None]).flatten()
    count = edges.diff(dim=1).clamp_min(1).flatten()
    # Token indices of all shares, concatenated: a running number, shifted so that each share begins at its start.
    tokens = torch.arange(int(count.sum())) + (start - count.cumsum(0) + count).repeat_interleave(count)
    embeddings = icae.embed(ids[tokens.to(ids.device)])
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    means = torch.segment_reduce(wide, "mean", lengths=count.to(wide.device))
    return means.unflatten(0, (len(lengths), memory_size))
