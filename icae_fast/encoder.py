"""The encoder: spans of any number of contexts to memory slots, packed and without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from icae_fast.spans import micro_batches, pack_spans, slots_per_span, span_lengths

if TYPE_CHECKING:
    from icae_fast.modeling import ICAE


def encode_spans(
    icae: ICAE,
    contexts: Sequence[torch.Tensor],
    token_budget: int,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    dropout: bool = True,
    memory_size: int | None = None,
) -> list[torch.Tensor]:
    """See `ICAE.encode`; `dropout=False` leaves LoRA dropout out in training mode too."""
    config = icae.config
    k = slots_per_span(config, memory_size)
    cuts = [span_lengths(len(ids), config) for ids in contexts]
    spans = [span for ids, cut in zip(contexts, cuts, strict=True) for span in ids.split(cut)]
    lora = icae.encoder_weights.get(icae, dropout=dropout)
    memory_tokens = icae.memory_token_embed.weight[:k].to(icae.dtype)
    done, total = 0, sum(map(len, contexts))
    # Without a graph slots go into one block made beforehand: kept one by one between a micro-batch's activations,
    # they held the heap apart, and 64 spans took 40 % more memory than 32.
    block = None if torch.is_grad_enabled() else memory_tokens.new_empty(len(spans) * k, memory_tokens.shape[1])
    slots = []
    for batch in micro_batches([len(s) + k for s in spans], token_budget):
        chosen = [spans[i] for i in batch]
        lengths = [len(s) for s in chosen]
        rows = pack_spans(lengths, config, k).to(icae.device)
        pieces = [p for e in icae.embed(torch.cat(chosen)).split(lengths) for p in (e, memory_tokens)]
        hidden = icae.backbone.forward(torch.cat(pieces), rows, lora)
        if block is None:
            slots.append(scale_slots(icae, hidden))
        else:
            block[batch.start * k : batch.stop * k] = scale_slots(icae, hidden)
        done += sum(lengths)
        if on_progress is not None:
            on_progress(done, total)
    encoded = torch.cat(slots) if block is None else block
    return list(encoded.split([len(cut) * k for cut in cuts]))


def scale_slots(icae: ICAE, hidden: torch.Tensor) -> torch.Tensor:
    """The config's slot scaling: none, or `h / |h| * mean |embedding| * exp(gain)`, computed in fp32."""
    if icae.slot_gain is None:
        return hidden
    norm = icae.embedding_norm() * icae.slot_gain.exp()
    return (F.normalize(hidden.to(icae.slot_gain.dtype), dim=-1) * norm).to(hidden.dtype)
