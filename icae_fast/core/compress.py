"""Compressing contexts into memories, and extending memories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from icae_fast.backbone.modes import in_own_modes
from icae_fast.backbone.rows import micro_batches, token_budget_on
from icae_fast.checks import is_out_of_memory
from icae_fast.core.core import ICAECore
from icae_fast.core.encoder import Progress, encode_spans
from icae_fast.core.inputs import Context, as_list
from icae_fast.core.memory import Memory
from icae_fast.core.spans import CutContext
from icae_fast.errors import ContextTooLongError, InvalidInputError, NonFiniteError


@in_own_modes
def encode(
    core: ICAECore,
    contexts: Sequence[torch.Tensor],
    token_budget: int | None = None,
    on_progress: Progress | None = None,
    memory_size: int | None = None,
) -> list[torch.Tensor]:
    """Encode contexts to slots, with a graph for training.

    All spans of all contexts are packed into micro-batches of at most `token_budget` tokens, without padding. The
    head does not run, and in the last layer the context has keys and values only.

    Args:
        contexts: (L_i,) int64 ids of base tokens.
        token_budget: context and memory tokens of a micro-batch; a longer span is a micro-batch by itself. None for
            the device's default, see `icae_fast.backbone.rows.token_budget_on`.
        on_progress: called with (context tokens done, total) after each micro-batch.
        memory_size: k', to put the first k' memory tokens behind the same spans instead of all k. An adapter trained
            with many k' serves them all (`with_memory_size`). With `append` positions these are the first k' slots
            of each span, because attention is causal; with `spread` positions they stand elsewhere.

    Returns:
        (n_spans_i * k', d) for each context, in the compute dtype.

    Raises:
        InvalidInputError: memory_size is not 1 to k.
    """
    cuts = [CutContext.of(ids, core.config) for ids in contexts]
    return encode_spans(core, cuts, token_budget, on_progress, memory_size=memory_size)


def compress(
    core: ICAECore,
    contexts: Context | Sequence[Context],
    *,
    token_budget: int | None = None,
    on_progress: Progress | None = None,
) -> list[Memory]:
    """Compress texts or token ids, one or many, of any lengths.

    Each context is cut into spans by the reference's rule (`icae_fast.core.spans.span_lengths`). The result does not
    depend on the other contexts of the call. There is no dropout, in training mode neither. Text is tokenised as the
    base model's tokenizer does by default (with its BOS, if it adds one), as in the reference's inference scripts.

    Args:
        contexts: a text, a row of ids, or a list of those.
        token_budget: tokens of a micro-batch, which bounds the working memory; None for the device's default, 4096
            on the CPU and 32768 on CUDA.
        on_progress: called with (context tokens done, total) after each micro-batch.

    Returns:
        A list with one `Memory` for each context, also for a single one.

    Raises:
        InvalidInputError: no context, empty text, or ids out of range, negative or of memory tokens.
        ContextTooLongError: the slots exceed the base model's positions, or memory runs out.
        TokenizerMismatchError: text without a tokenizer.
        NonFiniteError: the slots hold NaN; the message names the weight that does.
    """
    cuts = [core.cut_context(c, f"context {i}") for i, c in enumerate(as_list(contexts))]
    return compress_cut(core, cuts, token_budget=token_budget, on_progress=on_progress)


@in_own_modes
@torch.no_grad()
def compress_cut(
    core: ICAECore,
    cuts: Sequence[CutContext],
    *,
    token_budget: int | None = None,
    on_progress: Progress | None = None,
) -> list[Memory]:
    """Compress contexts that `ICAECore.cut_context` has checked and cut; see `compress`."""
    token_budget = token_budget_on(core.device, token_budget)
    if token_budget < 1:
        raise InvalidInputError(f"token_budget is {token_budget}; give at least 1")
    try:
        slots = encode_spans(core, cuts, token_budget, on_progress, dropout=False)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise ContextTooLongError(
                f"memory ran out while compressing {sum(len(c.ids) for c in cuts)} tokens at "
                f"token_budget={token_budget}; lower token_budget or compress fewer documents at once"
            ) from error
        raise
    if not bool(torch.stack([torch.isfinite(s).all() for s in slots]).all()):  # one synchronisation with a GPU
        raise NonFiniteError(core.describe_non_finite("the memory slots"))
    return [Memory(s, len(c.ids), c.span_lengths) for s, c in zip(slots, cuts, strict=True)]


def context_batches(core: ICAECore, cuts: Sequence[CutContext], token_budget: int | None = None) -> Iterator[range]:
    """Yield consecutive ranges of contexts, each of a micro-batch of spans or of one longer context.

    For a caller that keeps the memories of each batch before the next one is compressed.
    """
    costs = [len(cut.ids) + len(cut.span_lengths) * core.config.memory_size for cut in cuts]
    return micro_batches(costs, token_budget_on(core.device, token_budget))


def extend(core: ICAECore, memory: Memory, more: Context, *, token_budget: int | None = None) -> Memory:
    """Return a memory of the old context followed by `more`, encoding only `more`.

    `more` is cut into spans by itself. If the old context consists of full spans (k * rate tokens) and `more` too,
    this is the cut that compressing the whole text would make, and the slots are equal. In all other cases the
    reference's rule would cut the whole text into equal spans and move every boundary; here the old spans stay, the
    last of them perhaps short, and new spans follow. Text is tokenised without special tokens, as a continuation.

    Args:
        memory: of this model.
        more: a text or a row of ids.
        token_budget: as for `compress`.

    Raises:
        InvalidInputError: `more` is empty, or the memory has another k or hidden size.
        ContextTooLongError: all slots together exceed the base model's positions.
    """
    core.check_memory(memory)
    cut = core.cut_context(more, "the extension", special_tokens=False)
    new = compress_cut(core, [cut], token_budget=token_budget)[0]
    if memory.n_slots + new.n_slots >= core.max_positions:
        raise ContextTooLongError(
            f"{memory.n_slots} slots and {new.n_slots} more do not fit into the base model's "
            f"{core.max_positions} positions; keep the extension as a memory of its own"
        )
    return Memory(
        torch.cat((memory.slots.to(new.slots), new.slots)),
        memory.n_source_tokens + new.n_source_tokens,
        memory.span_lengths + new.span_lengths,
    )
