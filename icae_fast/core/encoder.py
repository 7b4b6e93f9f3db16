"""The encoder: spans of any number of contexts to memory slots, packed and without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from icae_fast.backbone.rows import PackedRows, micro_batches, token_budget_on
from icae_fast.core.spans import CutContext, pack_spans, slots_per_span

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore

Progress = Callable[[int, int], None]


def encode_spans(
    core: ICAECore,
    contexts: Sequence[CutContext],
    token_budget: int | None,
    on_progress: Progress | None = None,
    *,
    dropout: bool = True,
    memory_size: int | None = None,
) -> list[torch.Tensor]:
    """Encode contexts that are cut into spans; see `ICAE.encode`.

    Args:
        core: the model.
        contexts: at least one.
        token_budget: context and memory tokens of a micro-batch, or None for the device's default.
        on_progress: called with (context tokens done, total) after each micro-batch.
        dropout: apply LoRA dropout in training mode.
        memory_size: k', slots a span; None for k.

    Returns:
        (n_spans_i * k', d) slots of each context, in the compute dtype; without a graph each is a tensor of its own.
    """
    k = slots_per_span(core.config, memory_size)
    cuts = [context.spans() for context in contexts]
    spans = [span for cut in cuts for span in cut]
    lora = core.encoder_weights.get(core.backbone, core.adapter, core.config, dropout=dropout)
    memory_tokens = memory_tokens_of(core, k)
    done, total = 0, sum(map(len, spans))
    counts = [len(cut) * k for cut in cuts]
    # Without a graph, slots go into tensors allocated up front. Kept one by one between the activations of
    # micro-batches they fragment the heap: 64 spans took 40 % more memory than 32. Each context has a tensor of its
    # own, because a view would keep the slots of all contexts alive.
    owned = [] if torch.is_grad_enabled() else [memory_tokens.new_empty(n, memory_tokens.shape[1]) for n in counts]
    places = [place for own in owned for place in own.split(k)]
    norm = slot_norm(core)
    slots = []
    for batch in micro_batches([len(s) + k for s in spans], token_budget_on(core.device, token_budget)):
        chosen = [spans[i] for i in batch]
        x, rows = embed_spans(core, chosen, memory_tokens)
        encoded = scale_slots(core.backbone.forward(x, rows, lora), norm, core.slot_gain)
        if owned:
            for i, part in zip(batch, encoded.split(k), strict=True):
                places[i].copy_(part)
        else:
            slots.append(encoded)
        done += sum(map(len, chosen))
        if on_progress is not None:
            on_progress(done, total)
    return owned or list(torch.cat(slots).split(counts))


def memory_tokens_of(core: ICAECore, memory_size: int) -> torch.Tensor:
    """Return the embeddings of the first memory tokens, (memory_size, d) in the compute dtype."""
    return core.memory_token_embed.weight[:memory_size].to(core.dtype)


def embed_spans(
    core: ICAECore, spans: Sequence[torch.Tensor], memory_tokens: torch.Tensor
) -> tuple[torch.Tensor, PackedRows]:
    """Embed and pack spans, each between the leading (sink) token and the memory tokens.

    Args:
        core: the model.
        spans: (L_i,) int64 ids each.
        memory_tokens: (k', d) embeddings.

    Returns:
        (T, d) embeddings and their layout.
    """
    lengths, leading = [len(s) for s in spans], core.leading_ids
    rows = pack_spans(lengths, core.config, len(memory_tokens), len(leading)).to(core.device)
    before = [core.embed(torch.tensor(leading))] if leading else []
    embedded = core.embed(torch.cat(tuple(spans))).split(lengths)
    pieces = [p for e in embedded for p in (*before, e, memory_tokens)]
    return torch.cat(pieces), rows


def slot_norm(core: ICAECore) -> torch.Tensor | None:
    """Return the norm () that slots are scaled to before the gain, or None without slot scaling."""
    return None if core.slot_gain is None else core.embedding_norm()


def scale_slots(hidden: torch.Tensor, norm: torch.Tensor | None, gain: torch.Tensor | None) -> torch.Tensor:
    """Apply the config's slot scaling: none, or `h / |h| * norm * exp(gain)`, computed in the gain's dtype."""
    if gain is None or norm is None:
        return hidden
    return (F.normalize(hidden.to(gain.dtype), dim=-1) * (norm * gain.exp())).to(hidden.dtype)
