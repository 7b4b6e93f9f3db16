"""Training losses: slots in their places, the frozen decoder, and its loss.

`forward` is the reference's training forward, and `token_losses` returns the losses only. With labels and a gradient
both take the same path, which makes no logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from icae_fast.backbone.modes import in_own_modes
from icae_fast.backbone.modules import is_plain_linear
from icae_fast.backbone.rows import PackedRows, cumulative
from icae_fast.core.compress import encode
from icae_fast.core.core import ICAECore
from icae_fast.core.inputs import Vocabulary
from icae_fast.errors import InvalidInputError
from icae_fast.step.budget import ActivationBudget
from icae_fast.step.head_loss import CHUNK_ROWS, head_argmax, head_loss
from icae_fast.step.labels import (
    IGNORE,
    Rows,
    check_contexts,
    check_prompt_lengths,
    shifted_targets,
    unpad,
)
from icae_fast.step.layout import LaidOut, copy_once, lay_out, memory_places
from icae_fast.step.output import LazyTensor, TrainingOutput
from icae_fast.step.training_step import TrainingStep

ACTIVATION_BUDGET = ActivationBudget()


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """Losses of the labelled tokens of a batch, row after row.

    Args:
        losses: (n,) fp32, with a graph.
        correct: (n,) bool, whether the label has the highest logit.
        rows: (n,) int64 index of the row of each.
    """

    losses: torch.Tensor
    correct: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, eq=False)
class Teacher:
    """Hidden states to distil the decoder's answers from; see `icae_fast.step.head_loss` for the loss.

    Args:
        hidden: (m, d) final-normed hidden states of the base model, one for each labelled token that has a teacher.
        covered: (n,) bool, which labelled tokens these are; the others have their cross-entropy only.
        alpha: weight of the divergence from the teacher.
        temperature: tau.
    """

    hidden: torch.Tensor
    covered: torch.Tensor
    alpha: float
    temperature: float = 1.0


@in_own_modes
def forward(
    core: ICAECore,
    input_ids: Rows,
    prompt_answer_ids: Rows,
    labels: Rows | None = None,
    token_budget: int | None = None,
) -> dict[str, torch.Tensor | None]:
    """Run the reference's training forward, for any number of rows.

    Contexts are compressed, memory ids in `prompt_answer_ids` are replaced in order by the slots of all spans, and
    the frozen decoder is scored on the labels:

        loss = mean over labels that are not -100 of -log p(label_t | before t),  shifted by one

    With labels and autograd on, the loss is that of `token_losses`, at the same time and memory, and the logits are
    computed when `out["logits"]` is read: a second forward of the decoder, behind the same slots. Under `no_grad` these
    logits have no graph. Otherwise they have one, which ends in the slots' graph: add what you compute from them to the
    loss, and call `backward` once.

    Args:
        input_ids: (B, L) contexts, right-padded with the [PAD] id, or a list of (L_i,).
        prompt_answer_ids: (B, S), likewise; row i has as many memory ids as its spans times k.
        labels: (B, S), -100 where nothing is learned, or None for no loss.
        token_budget: see `encode`.

    Returns:
        `{"loss": () fp32 or None, "logits": (B, S, base vocabulary)}`; logits of padding are zeros. With labels and
        autograd on, a `TrainingOutput`.

    Raises:
        InvalidInputError: shapes or ids that do not fit, or a number of memory ids that is not the number of slots.
    """
    pad = core.vocabulary.pad
    contexts, prompts = check_contexts(core.vocabulary, unpad(input_ids, pad)), unpad(prompt_answer_ids, pad)
    width = prompt_answer_ids.shape[1] if isinstance(prompt_answer_ids, torch.Tensor) else max(map(len, prompts))
    if labels is not None and torch.is_grad_enabled():
        budget = ActivationBudget(span_tokens=token_budget)
        scored = _scored_hidden(
            core, lay_out(core, contexts, prompts, labels, None, every_row=False), budget, None, None
        )
        losses, _ = _head_losses(scored.hidden, core.base_model.lm_head, scored.targets, None)
        lengths = [len(p) for p in prompts]
        lazy = LazyTensor(lambda: _padded(_logits(core, scored.embeddings, lengths), lengths, width))
        return TrainingOutput(loss=losses.mean(), logits=lazy)
    targets = None if labels is None else shifted_targets(labels, prompts, core.vocabulary.n_base)
    lengths = check_prompt_lengths(contexts, prompts, core.max_positions)
    slots, packed = encode(core, contexts, token_budget), torch.cat(prompts)
    _check_prompts(core.vocabulary, prompts, [len(s) for s in slots])
    places = memory_places(core.vocabulary, packed)
    packed, places = copy_once(core.device, packed, places)
    embeddings = _with_slots(core, packed, places, slots)
    logits = _logits(core, embeddings, lengths)
    loss = None if targets is None else _mean_loss(logits, targets)
    return {"loss": loss, "logits": _padded(logits, lengths, width)}


@in_own_modes
def token_losses(
    core: ICAECore,
    contexts: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    budget: ActivationBudget = ACTIVATION_BUDGET,
    memory_size: int | None = None,
    teacher: Teacher | None = None,
    slots: Sequence[torch.Tensor] | None = None,
    own_tokens: torch.Tensor | None = None,
) -> TokenLosses:
    """Return the losses of `forward`, one per labelled token, at a fraction of its time and memory.

    No logits are kept. The head and the last layer's queries run for labelled positions only, and what exceeds
    `budget` is recomputed in the backward. The mean of the losses is the loss of `forward`, with the same gradients.

    Args:
        contexts: (L_i,) int64 ids of base tokens, one for each row.
        prompts: (S_i,) int64, the decoder's input of row i, with a memory id for each slot.
        labels: (S_i,) int64, -100 where nothing is learned.
        budget: memory for what the backward would otherwise recompute.
        memory_size: slots per span, the first k' of the k; see `encode`.
        teacher: hidden states for distillation, in the order of the losses.
        slots: (n_spans_i * k', d) for each context, instead of the encoder's; gradients go to them.
        own_tokens: (sum of S_i,) bool. Where it is set at a labelled token, the decoder reads its own guess, found by
            `token_guesses` with the right tokens before it, unless that is EOS.

    Raises:
        InvalidInputError: shapes or ids that do not fit, a number of memory ids that is not the number of slots, or a
            teacher of another batch.
        ContextTooLongError: a row is longer than `max_positions`.
    """
    laid = lay_out(core, contexts, prompts, labels, slots, own_tokens=own_tokens)
    if own_tokens is not None:
        laid = laid._replace(packed=_with_guesses(core, laid, memory_size, slots))
    found = _scored_hidden(core, laid, budget, memory_size, slots)
    return TokenLosses(*_head_losses(found.hidden, core.base_model.lm_head, found.targets, teacher), found.rows)


@in_own_modes
@torch.no_grad()
def token_guesses(
    core: ICAECore,
    contexts: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    memory_size: int | None = None,
    slots: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the decoder's argmax at each labelled token, teacher-forced on the tokens before it.

    Args:
        contexts, prompts, labels, memory_size, slots: as for `token_losses`.

    Returns:
        (n,) int64 ids, in the order of the losses, without a graph.

    Raises:
        InvalidInputError, ContextTooLongError: see `token_losses`.
    """
    return _guesses(core, lay_out(core, contexts, prompts, labels, slots), memory_size, slots)


def _guesses(
    core: ICAECore, laid: LaidOut, memory_size: int | None, slots: Sequence[torch.Tensor] | None
) -> torch.Tensor:
    """Return the decoder's argmax at each labelled token."""
    # Without a graph nothing is kept, so any budget does.
    found = _scored_hidden(core, laid, ACTIVATION_BUDGET, memory_size, slots)
    head = core.base_model.lm_head
    if not is_plain_linear(head, found.hidden):
        return torch.cat([head(rows).argmax(1) for rows in found.hidden.split(CHUNK_ROWS)])
    return head_argmax(found.hidden, head.weight, bias=head.bias)


@torch.no_grad()
def _with_guesses(
    core: ICAECore, laid: LaidOut, memory_size: int | None, slots: Sequence[torch.Tensor] | None
) -> torch.Tensor:
    """Return the packed prompts with the decoder's guesses at `laid.own`; nothing goes through the host."""
    guesses = _guesses(core, laid, memory_size, slots)[laid.guessed]
    right = laid.packed[laid.own]
    for end in core.eos_token_ids:
        guesses = torch.where(guesses == end, right, guesses)
    return laid.packed.index_copy(0, laid.own, guesses)


class _Scored(NamedTuple):
    """What a head scores.

    Args:
        hidden: (n, d) final hidden states that predict a label.
        targets: (n,) these labels.
        rows: (n,) the row of each.
        embeddings: (T, d) input of the decoder, all rows in full.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    embeddings: torch.Tensor


def _scored_hidden(
    core: ICAECore,
    laid: LaidOut,
    budget: ActivationBudget,
    memory_size: int | None,
    slots: Sequence[torch.Tensor] | None,
) -> _Scored:
    """Return the final hidden states that predict a label."""
    step = TrainingStep(core, laid.contexts, len(laid.kept), budget, memory_size)
    _check_prompts(core.vocabulary, laid.prompts, step.slot_counts if slots is None else [len(s) for s in slots])
    embeddings = _with_slots(core, laid.packed, laid.places, step.encode() if slots is None else slots)
    hidden = step.decode(embeddings[laid.kept], laid.rows.to(core.device))
    return _Scored(hidden[laid.scored] if laid.has_gaps else hidden, laid.targets, laid.row_of, embeddings)


@in_own_modes
def _logits(core: ICAECore, embeddings: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return all logits (T, V) of the decoder's packed input (T, d)."""
    rows = PackedRows(torch.cat([torch.arange(n) for n in lengths]), cumulative(lengths), max(lengths))
    return core.base_model.lm_head(core.backbone.forward(embeddings, rows.to(core.device)))


def _padded(logits: torch.Tensor, lengths: Sequence[int], width: int) -> torch.Tensor:
    """Return packed logits (T, V) as (B, width, V) with zeros at padding."""
    padded = pad_sequence(logits.split(list(lengths)), batch_first=True)
    return F.pad(padded, (0, 0, 0, width - padded.shape[1]))


def _head_losses(
    hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor, teacher: Teacher | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and correctness of each labelled token, distilled where the teacher covers it."""
    if not is_plain_linear(head, hidden):
        return _module_losses(hidden, head, targets, teacher)
    if teacher is None:
        return head_loss(hidden, head.weight, targets, bias=head.bias)
    if len(teacher.covered) != len(targets) or int(teacher.covered.sum()) != len(teacher.hidden):
        raise InvalidInputError(
            f"the teacher covers {int(teacher.covered.sum())} of {len(teacher.covered)} labelled tokens with "
            f"{len(teacher.hidden)} hidden states, but {len(targets)} tokens are labelled; make it of the same batch"
        )
    covered = teacher.covered.to(hidden.device)
    own: dict[str, Any] = {"teacher_hidden": teacher.hidden, "alpha": teacher.alpha, "temperature": teacher.temperature}
    parts = [(covered.nonzero()[:, 0], own), ((~covered).nonzero()[:, 0], {})]
    found = [head_loss(hidden[i], head.weight, targets[i], bias=head.bias, **options) for i, options in parts]
    back = torch.cat([i for i, _ in parts]).argsort()
    losses, correct = (torch.cat(values)[back] for values in zip(*found, strict=True))
    return losses, correct


def _module_losses(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, teacher: Teacher | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same by a head that is more than a frozen linear module (hooks, an adapter), with all its logits."""
    if teacher is not None:
        raise InvalidInputError("distillation needs a plain, frozen head; remove hooks and adapters from lm_head")
    logits = head(hidden)
    losses = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")
    return losses, logits.gather(1, targets[:, None])[:, 0] >= logits.amax(1)


def _check_prompts(vocabulary: Vocabulary, prompts: Sequence[torch.Tensor], slot_counts: Sequence[int]) -> None:
    """Raise unless each prompt, on the host, has valid ids and a memory id for each slot of its row."""
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


def _with_slots(
    core: ICAECore, packed: torch.Tensor, places: torch.Tensor, slots: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the (T, d) embeddings of packed prompts, with the slots in the places of the memory ids.

    Args:
        core: the model.
        packed: (T,) int64 ids on the device.
        places: (n_slots,) int64 positions of the memory ids, on the device.
        slots: (n_i, d) slots of each row.
    """
    embeddings = core.tokens_to_embeddings(packed)
    return embeddings.index_put((places,), torch.cat(list(slots)).to(embeddings))


def _mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in fp32 (fp64 for fp64 logits), as the reference's `nn.CrossEntropyLoss`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets.to(logits.device), ignore_index=IGNORE)
