"""The training forward: slots in their places, the frozen decoder, and its loss.

`decoder_forward` is the reference's, with all logits; `token_losses` gives the losses alone and needs no logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from icae_fast.backbone.rows import PackedRows, cumulative, pack_ends
from icae_fast.core.inputs import Vocabulary
from icae_fast.errors import ContextTooLongError, InvalidInputError
from icae_fast.step.budget import ActivationBudget
from icae_fast.step.head_loss import head_argmax, head_loss
from icae_fast.step.training_step import TrainingStep

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE

IGNORE = -100

Rows = torch.Tensor | Sequence[torch.Tensor]


def decoder_forward(
    icae: ICAE, input_ids: Rows, prompt_answer_ids: Rows, labels: Rows | None, token_budget: int | None
):
    """See `ICAE.forward`."""
    pad = icae.vocabulary.pad
    contexts, prompts = _contexts(icae, unpad(input_ids, pad)), unpad(prompt_answer_ids, pad)
    targets = None if labels is None else _targets(labels, prompts, icae.vocabulary.n_base)
    lengths = _lengths(icae, contexts, prompts)
    slots, packed = icae.encode(contexts, token_budget), torch.cat(prompts)
    _check_prompts(icae.vocabulary, prompts, [len(s) for s in slots])
    places = _memory_places(icae.vocabulary, packed)
    embeddings = _with_slots(icae, *_copy_once(icae.device, packed, places), slots)
    rows = PackedRows(torch.cat([torch.arange(n) for n in lengths]), cumulative(lengths), max(lengths))
    logits = icae.base_model.lm_head(icae.backbone.forward(embeddings, rows.to(icae.device)))
    width = prompt_answer_ids.shape[1] if isinstance(prompt_answer_ids, torch.Tensor) else max(lengths)
    padded = pad_sequence(logits.split(lengths), batch_first=True)
    padded = F.pad(padded, (0, 0, 0, width - padded.shape[1]))
    return {"loss": None if targets is None else _loss(logits, targets), "logits": padded}


@dataclass(frozen=True)
class TokenLosses:
    """Losses of the labelled tokens of a batch, row after row.

    Args:
        losses: (n,) fp32, with a graph.
        correct: (n,) bool, whether the label has the highest logit.
        rows: (n,) int64 row of each.
    """

    losses: torch.Tensor
    correct: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Teacher:
    """What the decoder's answers are distilled from; see `icae_fast.step.head_loss` for the loss.

    Args:
        hidden: (m, d) final-normed hidden states of the base model, which predict those labelled tokens that have a
            teacher.
        covered: (n,) bool, which of all labelled tokens these are; the others have their cross-entropy alone.
        alpha: share of the divergence from the teacher.
        temperature: tau.
    """

    hidden: torch.Tensor
    covered: torch.Tensor
    alpha: float
    temperature: float = 1.0


def token_losses(
    icae: ICAE,
    contexts: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    budget: ActivationBudget,
    memory_size: int | None = None,
    teacher: Teacher | None = None,
    slots: Sequence[torch.Tensor] | None = None,
) -> TokenLosses:
    """See `ICAE.token_losses`."""
    hidden, targets, row_of = _scored_hidden(icae, contexts, prompts, labels, budget, memory_size, slots)
    return TokenLosses(*_head_losses(hidden, icae.base_model.lm_head, targets, teacher), row_of)


@torch.no_grad()
def token_guesses(
    icae: ICAE,
    contexts: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    memory_size: int | None = None,
    slots: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """See `ICAE.token_guesses`."""
    # Without a graph nothing is kept, whatever the budget.
    hidden, _, _ = _scored_hidden(icae, contexts, prompts, labels, ActivationBudget(), memory_size, slots)
    head = icae.base_model.lm_head
    return head_argmax(hidden, head.weight, bias=head.bias)


def _scored_hidden(icae, contexts, prompts, labels, budget, memory_size, slots):
    """The decoder's final hidden states that predict a label, those labels, and the row of each."""
    contexts = _contexts(icae, _integer_rows(contexts, "contexts"))
    prompts = _integer_rows(prompts, "prompts")
    targets = _targets(labels, prompts, icae.vocabulary.n_base)
    rows, kept, scored = _scored_rows(_lengths(icae, contexts, prompts), targets)
    if slots is not None and (len(slots) != len(prompts) or any(s.dim() != 2 for s in slots)):
        raise InvalidInputError(f"slots are given for {len(slots)} of {len(prompts)} rows; give (n, d) for each")
    row_of = torch.arange(len(prompts)).repeat_interleave(rows.cu_seqlens_out.diff())
    has_gaps = len(scored) < len(row_of)
    if has_gaps:
        row_of = row_of[scored]
    # Ids and labels are copied to the device here, in one transfer; lengths and the layout stay on the host.
    contexts, packed = contexts if slots is None else [], torch.cat(prompts)
    places, wanted = _memory_places(icae.vocabulary, packed), targets[targets != IGNORE]
    packed, places, kept, scored, wanted, *contexts = _copy_once(
        icae.device, packed, places, kept, scored, wanted, *contexts
    )
    step = TrainingStep(icae, contexts, len(kept), budget, memory_size)
    _check_prompts(icae.vocabulary, prompts, step.slot_counts if slots is None else [len(s) for s in slots])
    embeddings = _with_slots(icae, packed, places, step.encode() if slots is None else slots)[kept]
    hidden = step.decode(embeddings, rows.to(icae.device))
    return hidden[scored] if has_gaps else hidden, wanted, row_of


def _head_losses(hidden, head, targets, teacher):
    """Losses and correctness of each labelled token, with a teacher for those that are covered."""
    if teacher is None:
        return head_loss(hidden, head.weight, targets, bias=head.bias)
    if len(teacher.covered) != len(targets) or int(teacher.covered.sum()) != len(teacher.hidden):
        raise InvalidInputError(
            f"the teacher covers {int(teacher.covered.sum())} of {len(teacher.covered)} labelled tokens with "
            f"{len(teacher.hidden)} hidden states, but {len(targets)} tokens are labelled; make it of the same batch"
        )
    covered = teacher.covered.to(hidden.device)
    own = {"teacher_hidden": teacher.hidden, "alpha": teacher.alpha, "temperature": teacher.temperature}
    parts = [(covered.nonzero()[:, 0], own), ((~covered).nonzero()[:, 0], {})]
    found = [head_loss(hidden[i], head.weight, targets[i], bias=head.bias, **options) for i, options in parts]
    back = torch.cat([i for i, _ in parts]).argsort()
    return (torch.cat(values)[back] for values in zip(*found, strict=True))


def _scored_rows(lengths, targets):
    """Where packed prompts are scored.

    A row's queries in the last layer are its last ones, so a row ends with the last position that has a target, and
    those from its first one on are asked for.

    Returns:
        the layout of the shortened rows; the positions that they keep of the packed prompts; which of the hidden
        states that are asked for have a target.
    """
    lasts, counts, kept, scored, start, n_out = [], [], [], [], 0, 0
    for i, row in enumerate((targets != IGNORE).split(lengths)):
        found = row.nonzero()[:, 0]
        if not len(found):
            raise InvalidInputError(f"row {i} has no label to learn but -100; leave it out")
        first, last = int(found[0]), int(found[-1])
        lasts.append(last + 1)
        counts.append(last + 1 - first)
        kept.append(torch.arange(start, start + last + 1))
        scored.append(found - first + n_out)
        start, n_out = start + lengths[i], n_out + counts[-1]
    return pack_ends(lasts, counts), torch.cat(kept), torch.cat(scored)


def _contexts(icae, rows):
    return [icae.vocabulary.check_context(r, f"context {i}") for i, r in enumerate(rows)]


def _lengths(icae, contexts, prompts):
    """Lengths of the prompts, checked against contexts and positions."""
    if len(contexts) != len(prompts):
        raise InvalidInputError(
            f"there are {len(contexts)} contexts and {len(prompts)} prompts; give one of each a row"
        )
    lengths = [len(p) for p in prompts]
    if max(lengths) > icae.max_positions:
        raise ContextTooLongError(
            f"a prompt with its slots takes {max(lengths)} positions, but the base model has {icae.max_positions}; "
            "shorten it, or set icae.max_positions higher if the base model extrapolates"
        )
    return lengths


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


def _copy_once(device: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copy int64 tensors of one dimension from the host to a device, all in one transfer."""
    packed = torch.cat(tensors).to(device, non_blocking=True)
    return packed.split([len(t) for t in tensors])


def _memory_places(vocabulary: Vocabulary, packed: torch.Tensor) -> torch.Tensor:
    """Return the (n_slots,) positions of the memory ids among packed ids."""
    return vocabulary.is_memory(packed).nonzero()[:, 0]


def _check_prompts(vocabulary: Vocabulary, prompts: Sequence[torch.Tensor], slot_counts: Sequence[int]) -> None:
    """Raise unless each prompt, on the host, has valid ids and a memory id for each of its row's slots."""
    for i, (row, n_slots) in enumerate(zip(prompts, slot_counts, strict=True)):
        n = int(vocabulary.is_memory(row).sum())
        if len(row) == 0 or n != n_slots:
            raise InvalidInputError(
                f"row {i} of prompt_answer_ids has {n} memory ids, but its context gives {n_slots} slots; put "
                "memory_size ids for each span"
            )
        if int(row.min()) < 0 or int(row.max()) > vocabulary.ft or bool((row == vocabulary.pad).any()):
            raise InvalidInputError(
                f"row {i} of prompt_answer_ids holds ids outside 0 to {vocabulary.ft}, or [PAD] before its end"
            )


def _with_slots(icae: ICAE, packed: torch.Tensor, places: torch.Tensor, slots: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the (T, d) embeddings of packed prompts with the slots in the places of the memory ids.

    Args:
        icae: the model.
        packed: (T,) int64 ids on the device.
        places: (n_slots,) int64 positions of the memory ids, on the device.
        slots: (n_i, d) of each row.
    """
    embeddings = icae.tokens_to_embeddings(packed)
    return embeddings.index_put((places,), torch.cat(list(slots)).to(embeddings))


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
