"""The encoder: spans of any number of contexts to memory slots, packed and without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from icae_fast.backbone.rows import micro_batches, token_budget_on
from icae_fast.core.spans import cut_contexts, pack_spans, slots_per_span

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE


def encode_spans(
    icae: ICAE,
    contexts: Sequence[torch.Tensor],
    token_budget: int | None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    dropout: bool = True,
    memory_size: int | None = None,
) -> list[torch.Tensor]:
    """See `ICAE.encode`; `dropout=False` leaves LoRA dropout out in training mode too."""
    k = slots_per_span(icae.config, memory_size)
    spans, span_counts = cut_contexts(contexts, icae.config)
    lora = icae.encoder_weights.get(icae, dropout=dropout)
    memory_tokens = memory_tokens_of(icae, k)
    done, total = 0, sum(map(len, contexts))
    # Without a graph slots go into one block made beforehand: kept one by one between a micro-batch's activations,
    # they held the heap apart, and 64 spans took 40 % more memory than 32.
    block = None if torch.is_grad_enabled() else memory_tokens.new_empty(len(spans) * k, memory_tokens.shape[1])
    norm = slot_norm(icae)
    slots = []
    for batch in micro_batches([len(s) + k for s in spans], token_budget_on(icae.device, token_budget)):
        chosen = [spans[i] for i in batch]
        x, rows = embed_spans(icae, chosen, memory_tokens)
        encoded = scale_slots(icae.backbone.forward(x, rows, lora), norm, icae.slot_gain)
        if block is None:
            slots.append(encoded)
        else:
            block[batch.start * k : batch.stop * k] = encoded
        done += sum(map(len, chosen))
        if on_progress is not None:
            on_progress(done, total)
    encoded = torch.cat(slots) if block is None else block
    return list(encoded.split([n * k for n in span_counts]))


def memory_tokens_of(icae: ICAE, memory_size: int) -> torch.Tensor:
    """(memory_size, d) embeddings of the first memory tokens in the compute dtype."""
    return icae.memory_token_embed.weight[:memory_size].to(icae.dtype)


def embed_spans(icae: ICAE, spans: Sequence[torch.Tensor], memory_tokens: torch.Tensor):
    """Embeddings of packed spans, each with the sink token before it and the memory tokens behind, (T, d), and their
    layout."""
    lengths, leading = [len(s) for s in spans], icae.leading_ids
    rows = pack_spans(lengths, icae.config, len(memory_tokens), len(leading)).to(icae.device)
    before = [icae.embed(torch.tensor(leading))] if leading else []
    embedded = icae.embed(torch.cat(tuple(spans))).split(lengths)
    pieces = [p for e in embedded for p in (*before, e, memory_tokens)]
    return torch.cat(pieces), rows


def slot_norm(icae: ICAE) -> torch.Tensor | None:
    """() norm that slots are scaled to before the gain, None without slot scaling."""
    return None if icae.slot_gain is None else icae.embedding_norm()


def scale_slots(hidden: torch.Tensor, norm: torch.Tensor | None, gain: torch.Tensor | None) -> torch.Tensor:
    """The config's slot scaling: none, or `h / |h| * norm * exp(gain)`, computed in the gain's dtype."""
    if gain is None:
        return hidden
    return (F.normalize(hidden.to(gain.dtype), dim=-1) * (norm * gain.exp())).to(hidden.dtype)
