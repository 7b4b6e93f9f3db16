"""The encoder: spans of any number of contexts to memory slots, packed and without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from icae_fast.recompute import NOTHING, Recompute, replay
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
    recompute: Recompute = NOTHING,
    memory_size: int | None = None,
) -> list[torch.Tensor]:
    """See `ICAE.encode`; `dropout=False` leaves LoRA dropout out in training mode too."""
    config = icae.config
    k = slots_per_span(config, memory_size)
    cuts = [span_lengths(len(ids), config) for ids in contexts]
    spans = [span for ids, cut in zip(contexts, cuts, strict=True) for span in ids.split(cut)]
    lora = icae.encoder_weights.get(icae, dropout=dropout)
    memory_tokens = icae.memory_token_embed.weight[:k].to(icae.dtype)
    norm = None if icae.slot_gain is None else icae.embedding_norm()
    done, total = 0, sum(map(len, contexts))
    batches = list(micro_batches([len(s) + k for s in spans], token_budget))
    if recompute.spans and torch.is_grad_enabled():
        encoded = _encode_twice(icae, [[spans[i] for i in b] for b in batches], lora, memory_tokens, norm, recompute)
        return list(encoded.split([len(cut) * k for cut in cuts]))
    # Without a graph slots go into one block made beforehand: kept one by one between a micro-batch's activations,
    # they held the heap apart, and 64 spans took 40 % more memory than 32.
    block = None if torch.is_grad_enabled() else memory_tokens.new_empty(len(spans) * k, memory_tokens.shape[1])
    slots = []
    for batch in batches:
        chosen = [spans[i] for i in batch]
        encoded = _encode_batch(icae, chosen, lora, memory_tokens, norm, icae.slot_gain, recompute)
        if block is None:
            slots.append(encoded)
        else:
            block[batch.start * k : batch.stop * k] = encoded
        done += sum(map(len, chosen))
        if on_progress is not None:
            on_progress(done, total)
    encoded = torch.cat(slots) if block is None else block
    return list(encoded.split([len(cut) * k for cut in cuts]))


def _encode_batch(icae, spans, lora, memory_tokens, norm, gain, recompute):
    """Slots of one micro-batch of spans, (spans * k, d)."""
    lengths = [len(s) for s in spans]
    rows = pack_spans(lengths, icae.config, len(memory_tokens)).to(icae.device)
    pieces = [p for e in icae.embed(torch.cat(spans)).split(lengths) for p in (e, memory_tokens)]
    layers = recompute if recompute.encoder_layers else None
    return scale_slots(icae.backbone.forward(torch.cat(pieces), rows, lora, recompute=layers), norm, gain)


def _encode_twice(icae, batches, lora, memory_tokens, norm, recompute):
    """All micro-batches without a graph, each with one when its backward comes.

    The packed factors, with their dropout seeds, serve both times, so that both see the same masks.
    """
    n = len(lora)

    def run_of(spans):
        def run(memory_tokens, *rest):
            factors, gain = rest[: 2 * n], rest[2 * n] if len(rest) > 2 * n else None
            own = [replace(p, a=a, b=b) for p, a, b in zip(lora, factors[:n], factors[n:], strict=True)]
            return _encode_batch(icae, spans, own, memory_tokens, norm, gain, recompute)

        return run

    tensors = [memory_tokens, *(p.a for p in lora), *(p.b for p in lora)]
    tensors += [] if icae.slot_gain is None else [icae.slot_gain]
    sizes = [len(spans) * memory_tokens.shape[0] for spans in batches]
    return replay([run_of(spans) for spans in batches], sizes, *tensors)


def scale_slots(hidden: torch.Tensor, norm: torch.Tensor | None, gain: torch.Tensor | None) -> torch.Tensor:
    """The config's slot scaling: none, or `h / |h| * mean |embedding| * exp(gain)`, computed in the gain's dtype."""
    if gain is None:
        return hidden
    return (F.normalize(hidden.to(gain.dtype), dim=-1) * (norm * gain.exp())).to(hidden.dtype)
