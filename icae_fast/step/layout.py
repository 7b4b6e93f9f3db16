"""A batch of a training step laid out: ids and labels on the device after one transfer, lengths on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from icae_fast.backbone.rows import PackedRows
from icae_fast.core.core import ICAECore
from icae_fast.core.inputs import Vocabulary
from icae_fast.errors import InvalidInputError
from icae_fast.step.labels import (
    IGNORE,
    Rows,
    check_contexts,
    check_prompt_lengths,
    integer_rows,
    scored_rows,
    shifted_targets,
)


class LaidOut(NamedTuple):
    """A batch whose ids are on the device, and whose lengths and rows are on the host.

    Args:
        prompts: (S_i,) ids of each row, on the host.
        rows: rows of the decoder, with the labelled positions of each.
        row_of: (n,) the row of each labelled token, on the host.
        has_gaps: whether `scored` leaves positions of `kept` out.
        packed: (T,) ids of all prompts.
        places: (n_slots,) positions of the memory ids among them.
        kept: positions that the decoder reads.
        scored: those of them that predict a label, if there are gaps.
        targets: (n,) labels.
        own, guessed: positions where the decoder reads its own guess, and the labelled token of each.
        contexts: ids of each context, empty if slots are given.
    """

    prompts: Sequence[torch.Tensor]
    rows: PackedRows
    row_of: torch.Tensor
    has_gaps: bool
    packed: torch.Tensor
    places: torch.Tensor
    kept: torch.Tensor
    scored: torch.Tensor
    targets: torch.Tensor
    own: torch.Tensor
    guessed: torch.Tensor
    contexts: Sequence[torch.Tensor]


def lay_out(
    core: ICAECore,
    contexts: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    labels: Rows,
    slots: Sequence[torch.Tensor] | None,
    *,
    every_row: bool = True,
    own_tokens: torch.Tensor | None = None,
) -> LaidOut:
    """Check a batch and copy it to the device; with `every_row`, a row without a label is an error."""
    contexts = check_contexts(core.vocabulary, integer_rows(contexts, "contexts"))
    prompts = integer_rows(prompts, "prompts")
    targets = shifted_targets(labels, prompts, core.vocabulary.n_base)
    lengths = check_prompt_lengths(contexts, prompts, core.max_positions)
    rows, kept, scored = scored_rows(lengths, targets, every_row=every_row)
    if slots is not None and (len(slots) != len(prompts) or any(s.dim() != 2 for s in slots)):
        raise InvalidInputError(f"slots are given for {len(slots)} of {len(prompts)} rows; give (n, d) for each")
    assert rows.cu_seqlens_out is not None  # `scored_rows` sets it
    row_of = torch.arange(len(prompts)).repeat_interleave(rows.cu_seqlens_out.diff())
    has_gaps = len(scored) < len(row_of)
    if has_gaps:
        row_of = row_of[scored]
    packed = torch.cat(prompts)
    predicts = (targets != IGNORE).nonzero()[:, 0]  # the labelled token is the next one
    guessed = torch.empty(0, dtype=torch.int64)
    if own_tokens is not None:
        if own_tokens.shape != packed.shape or own_tokens.dtype != torch.bool:
            raise InvalidInputError(f"own_tokens is {tuple(own_tokens.shape)}; give a bool for each id of the prompts")
        guessed = own_tokens[predicts + 1].nonzero()[:, 0]
    # Ids and labels are copied to the device here, in one transfer; lengths and the layout stay on the host.
    packed, places, kept, scored, wanted, own, guessed, *on_device = copy_once(
        core.device, packed, memory_places(core.vocabulary, packed), kept, scored, targets[predicts],
        predicts[guessed] + 1, guessed, *(contexts if slots is None else []),
    )  # fmt: skip
    return LaidOut(prompts, rows, row_of, has_gaps, packed, places, kept, scored, wanted, own, guessed, on_device)


def copy_once(device: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copy int64 tensors of one dimension from the host to a device, all in one transfer."""
    if not tensors:
        return ()
    packed = torch.cat(tensors).to(device, non_blocking=True)
    return packed.split([len(t) for t in tensors])


def memory_places(vocabulary: Vocabulary, packed: torch.Tensor) -> torch.Tensor:
    """Return the (n_slots,) positions of the memory ids among packed ids."""
    return vocabulary.is_memory(packed).nonzero()[:, 0]
