"""Labelled rows of a training batch: checks, shifted targets, and the positions that the head scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from icae_fast.backbone.rows import PackedRows, pack_ends
from icae_fast.core.inputs import Vocabulary
from icae_fast.errors import ContextTooLongError, InvalidInputError

IGNORE = -100

Rows = torch.Tensor | Sequence[torch.Tensor]


def unpad(rows: Rows, pad: int) -> list[torch.Tensor]:
    """Return rows without their trailing [PAD] ids, on the CPU.

    Args:
        rows: (B, L) or a list of (L_i,), integers.
        pad: id of [PAD].

    Raises:
        InvalidInputError: another shape, no integers, or no row.
    """
    stripped = []
    for row in integer_rows(rows, "ids"):
        real = (row != pad).nonzero()
        stripped.append(row[: int(real[-1]) + 1] if len(real) else row[:0])
    return stripped


def integer_rows(rows: Rows, what: str) -> list[torch.Tensor]:
    """Return the rows of a tensor or a list as int64 on the CPU.

    Raises:
        InvalidInputError: another shape, no integers, or no row.
    """
    listed = list(rows) if isinstance(rows, (torch.Tensor, Sequence)) else []
    if not listed or any(not isinstance(r, torch.Tensor) or r.dim() != 1 or r.is_floating_point() for r in listed):
        raise InvalidInputError(
            f"{what} must be an integer tensor of shape (rows, length) or a list of one-row tensors"
        )
    return [row.to(device="cpu", dtype=torch.int64) for row in listed]


def check_contexts(vocabulary: Vocabulary, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the contexts if each is a non-empty row of base tokens; raise `InvalidInputError` otherwise."""
    return [vocabulary.check_context(r, f"context {i}") for i, r in enumerate(rows)]


def check_prompt_lengths(
    contexts: Sequence[torch.Tensor], prompts: Sequence[torch.Tensor], max_positions: int
) -> list[int]:
    """Return the lengths of the prompts, checked against the contexts and the base model's positions.

    Raises:
        InvalidInputError: other numbers of contexts than of prompts.
        ContextTooLongError: a prompt exceeds the positions.
    """
    if len(contexts) != len(prompts):
        raise InvalidInputError(
            f"there are {len(contexts)} contexts and {len(prompts)} prompts; give one of each a row"
        )
    lengths = [len(p) for p in prompts]
    if max(lengths) > max_positions:
        raise ContextTooLongError(
            f"a prompt with its slots takes {max(lengths)} positions, but the base model has {max_positions}; "
            "shorten it, or set icae.max_positions higher if the base model extrapolates"
        )
    return lengths


def shifted_targets(labels: Rows, prompts: Sequence[torch.Tensor], n_base: int) -> torch.Tensor:
    """Return the labels shifted by one and packed like the prompts; a row's last position is ignored.

    Args:
        labels: a row for each prompt, -100 where nothing is learned.
        prompts: (S_i,) int64.
        n_base: size of the base vocabulary.

    Returns:
        (sum of S_i,) int64.

    Raises:
        InvalidInputError: other shapes than the prompts', labels on padding, or ids out of range.
    """
    rows = integer_rows(labels, "labels")
    if len(rows) != len(prompts) or any(len(r) < len(p) for r, p in zip(rows, prompts, strict=False)):
        raise InvalidInputError("labels must have the shape of prompt_answer_ids")
    packed = []
    for row, prompt in zip(rows, prompts, strict=True):
        if bool((row[len(prompt) :] != IGNORE).any()):
            raise InvalidInputError("labels stand where prompt_answer_ids is padding; set them to -100")
        packed.append(F.pad(row[1 : len(prompt)], (0, 1), value=IGNORE))
    target = torch.cat(packed)
    if bool(((target != IGNORE) & ((target < 0) | (target >= n_base))).any()):
        raise InvalidInputError(f"labels must be -100 or ids from 0 to {n_base - 1}")
    return target


def scored_rows(
    lengths: Sequence[int], targets: torch.Tensor, *, every_row: bool = True
) -> tuple[PackedRows, torch.Tensor, torch.Tensor]:
    """Shorten packed prompts to what their labels need.

    A row's queries in the last layer are its last ones. A row therefore ends with its last position that has a
    target, and has queries from its first such position on.

    Args:
        lengths: of the prompts.
        targets: (sum of lengths,) from `shifted_targets`.
        every_row: raise where a row has no label; False keeps its first position, without a target.

    Returns:
        The layout of the shortened rows; the positions that they keep of the packed prompts; which of the hidden
        states that they compute have a target.

    Raises:
        InvalidInputError: a row has no label, with `every_row`.
    """
    lasts, counts, kept, scored, start, n_out = [], [], [], [], 0, 0
    for i, row in enumerate((targets != IGNORE).split(list(lengths))):
        found = row.nonzero()[:, 0]
        if every_row and not len(found):
            raise InvalidInputError(f"row {i} has no label to learn but -100; leave it out")
        first, last = (int(found[0]), int(found[-1])) if len(found) else (0, 0)
        lasts.append(last + 1)
        counts.append(last + 1 - first)
        kept.append(torch.arange(start, start + last + 1))
        scored.append(found - first + n_out)
        start, n_out = start + lengths[i], n_out + counts[-1]
    return pack_ends(lasts, counts), torch.cat(kept), torch.cat(scored)
