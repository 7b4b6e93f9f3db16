"""The reference's training forward over padded or ragged rows: slots in place, frozen decoder, loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from icae_fast.errors import ContextTooLongError, InvalidInputError
from icae_fast.spans import PackedRows, cumulative

if TYPE_CHECKING:
    from icae_fast.modeling import ICAE

IGNORE = -100

Rows = torch.Tensor | Sequence[torch.Tensor]


def decoder_forward(icae: ICAE, input_ids: Rows, prompt_answer_ids: Rows, labels: Rows | None, token_budget: int):
    """See `ICAE.forward`."""
    pad = icae.vocabulary.pad
    contexts = [icae.vocabulary.check_context(r, f"context {i}") for i, r in enumerate(unpad(input_ids, pad))]
    prompts = unpad(prompt_answer_ids, pad)
    targets = None if labels is None else _targets(labels, prompts, icae.vocabulary.n_base)
    if len(contexts) != len(prompts):
        raise InvalidInputError(
            f"there are {len(contexts)} contexts and {len(prompts)} prompts; give one of each a row"
        )
    embeddings = _with_slots(icae, prompts, icae.encode(contexts, token_budget))
    lengths = [len(p) for p in prompts]
    if max(lengths) > icae.max_positions:
        raise ContextTooLongError(
            f"a prompt with its slots takes {max(lengths)} positions, but the base model has {icae.max_positions}; "
            "shorten it, or set icae.max_positions higher if the base model extrapolates"
        )
    rows = PackedRows(torch.cat([torch.arange(n) for n in lengths]), cumulative(lengths), max(lengths))
    logits = icae.base_model.lm_head(icae.backbone.forward(embeddings, rows.to(icae.device)))
    width = prompt_answer_ids.shape[1] if isinstance(prompt_answer_ids, torch.Tensor) else max(lengths)
    padded = pad_sequence(logits.split(lengths), batch_first=True)
    padded = F.pad(padded, (0, 0, 0, width - padded.shape[1]))
    return {"loss": None if targets is None else _loss(logits, targets), "logits": padded}


def unpad(rows: Rows, pad: int) -> list[torch.Tensor]:
    """Rows without their trailing [PAD] ids, on the CPU.

    Raises:
        InvalidInputError: not (B, L) or a list of (L_i,), not integers, or no row.
    """
    stripped = []
    for row in _integer_rows(rows, "ids"):
        real = (row != pad).nonzero()
        stripped.append(row[: int(real[-1]) + 1] if len(real) else row[:0])
    return stripped


def _integer_rows(rows: Rows, what: str) -> list[torch.Tensor]:
    """The rows of a tensor or list as int64 on the CPU."""
    listed = list(rows) if isinstance(rows, (torch.Tensor, Sequence)) else []
    if not listed or any(not isinstance(r, torch.Tensor) or r.dim() != 1 or r.is_floating_point() for r in listed):
        raise InvalidInputError(
            f"{what} must be an integer tensor of shape (rows, length) or a list of one-row tensors"
        )
    return [row.to(device="cpu", dtype=torch.int64) for row in listed]


def _with_slots(icae, prompts, slots):
    """Embeddings of all prompts packed, each memory id replaced by the next slot of its own row."""
    ids = torch.cat(prompts).to(icae.device)
    vocabulary = icae.vocabulary
    for i, (row, own) in enumerate(zip(prompts, slots, strict=True)):
        n = int(vocabulary.is_memory(row).sum())
        if len(row) == 0 or n != len(own):
            raise InvalidInputError(
                f"row {i} of prompt_answer_ids has {n} memory ids, but its context gives {len(own)} slots; put "
                "memory_size ids for each span"
            )
        if int(row.min()) < 0 or int(row.max()) > vocabulary.ft or bool((row == vocabulary.pad).any()):
            raise InvalidInputError(
                f"row {i} of prompt_answer_ids holds ids outside 0 to {vocabulary.ft}, or [PAD] before its end"
            )
    is_memory = vocabulary.is_memory(ids)
    embeddings = icae.tokens_to_embeddings(ids)
    return embeddings.index_put((is_memory.nonzero(as_tuple=True)[0],), torch.cat(slots).to(embeddings))


def _targets(labels, prompts, n_base):
    """Labels shifted by one, packed like the prompts: the target of a row's last position is ignored."""
    rows = _integer_rows(labels, "labels")
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


def _loss(logits, targets):
    """Mean cross-entropy in fp32 (fp64 for fp64 logits), as the reference's `nn.CrossEntropyLoss`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets.to(logits.device), ignore_index=IGNORE)
