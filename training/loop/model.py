"""The module that is trained: an ICAE whose forward returns the loss of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icae_fast import ICAE
from icae_fast.core.spans import slots_per_span
from icae_fast.step.budget import ActivationBudget
from icae_fast.step.loss import Teacher
from icae_fast.step.training_step import TrainingStep
from icae_fast.training.methods.batch import Batch
from icae_fast.training.methods.curriculum import CODE, EXCLUSIVE, WARM
from icae_fast.training.methods.distill import Distillation, teacher_hidden, teacher_rows
from icae_fast.training.methods.objectives import OBJECTIVES
from icae_fast.training.methods.slot_code import SlotCode
from icae_fast.training.methods.warm_start import warm_start_loss

NAMES = (*OBJECTIVES, *EXCLUSIVE)


class TrainingModel(nn.Module):
    """An `ICAE` as a trainer needs it: the forward takes a `Batch` and returns its loss.

    Only the adapter requires gradients. A step is one autograd graph, so DDP's hooks, gradient accumulation and
    optimisers are unaffected by recomputation in the backward.

    Args:
        icae: the model; its adapter is trained.
        budget: memory for activations that the backward would otherwise recompute, default that of
            `ActivationBudget`.
        distillation: distillation from the base model that reads the whole context, default none.
        code: slot code, trained by "code" batches and the target of warm starts, default none.
    """

    def __init__(
        self,
        icae: ICAE,
        budget: ActivationBudget | None = None,
        distillation: Distillation | None = None,
        code: SlotCode | None = None,
    ) -> None:
        super().__init__()
        self.icae = icae
        self.budget = budget or ActivationBudget()
        self.distillation = distillation or Distillation()
        self.code = code

    def forward(
        self, batch: Batch, num_items_in_batch: int | torch.Tensor | None = None, exclusive: str | None = None
    ) -> dict[str, Any]:
        """Return the loss of a batch.

            loss = sum of the labelled tokens' losses / num_items_in_batch

        Args:
            batch: packed samples in host memory. Where it has `own_tokens`, a forward without a graph first finds the
                decoder's guesses there, with the right tokens before them; the decoder then reads the guesses. EOS is
                never replaced. With a sharded base model either all processes have `own_tokens` or none, because all
                must run the same number of forwards.
            num_items_in_batch: labelled tokens of the whole optimiser step, or its slots in a warm start. Default:
                those of this batch.
            exclusive: "warm" for the encoder-only loss of `icae_fast.training.methods.warm_start`, summed over slots;
                "code" for slots from `code`, without an encoder. Default None: the batch's objectives.

        Returns:
            `loss` () fp32; three detached (5,) tensors indexed by `NAMES`: `sums` of the losses, `counts` of labelled
            tokens or slots, `correct` of those whose label had the highest logit or whose target was the nearest; and
            `without_teacher`, the number of rows that were too long for the teacher.
        """
        if exclusive == WARM:
            return self._warm(batch, num_items_in_batch)
        slots, teacher, without = None, None, 0
        if exclusive == CODE:
            assert self.code is not None  # a run with code stages has one
            slots = self.code.slots(self.icae, batch.contexts, slots_per_span(self.icae.config, batch.memory_size))
        elif self.distillation.alpha > 0 and self.training:
            teacher, without = self._teacher(batch)
        scored = self.icae.token_losses(
            batch.contexts, batch.prompts, batch.label_rows, self.budget, batch.memory_size, teacher, slots,
            batch.own_tokens,
        )  # fmt: skip
        losses = scored.losses.detach()
        objectives = [NAMES.index(exclusive or name) for name in batch.objectives]
        index = torch.tensor(objectives)[scored.rows].to(losses.device, non_blocking=True)
        return {
            "loss": scored.losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch),
            "sums": _by_objective(index, losses),
            "counts": _by_objective(index, torch.ones_like(losses)),
            "correct": _by_objective(index, scored.correct.to(losses)),
            "without_teacher": without,
        }

    def _teacher(self, batch: Batch) -> tuple[Teacher, int]:
        """Return the teacher of a batch, and how many rows were too long for it."""
        own = self.distillation
        rows = teacher_rows(self.icae, batch, own)
        hidden = teacher_hidden(self.icae, rows, own.token_budget)
        return Teacher(hidden, rows.covered, own.alpha, own.temperature), rows.n_too_long

    def _warm(self, batch: Batch, num_items_in_batch: int | torch.Tensor | None) -> dict[str, Any]:
        """Return the outputs of `forward` for a warm start."""
        contexts = batch.context_ids.to(self.icae.device, non_blocking=True).split(batch.context_lengths)
        slots = TrainingStep(self.icae, contexts, 0, self.budget, batch.memory_size).encode()
        found = warm_start_loss(self.icae, contexts, slots, batch.memory_size, self.code)
        return {
            "loss": found.loss / (found.n_slots if num_items_in_batch is None else num_items_in_batch),
            "sums": _of_warm_start(found.loss.detach(), found.loss),
            "counts": _of_warm_start(found.n_slots, found.loss),
            "correct": _of_warm_start(found.n_right, found.loss),
            "without_teacher": 0,
        }


def _by_objective(index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the (len(NAMES),) sums of values by the objective of each."""
    return values.new_zeros(len(NAMES)).index_add_(0, index, values)


def _of_warm_start(value: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return (len(NAMES),) zeros, but `value` for the warm start."""
    values = like.new_zeros(len(NAMES))
    values[NAMES.index(WARM)] = value
    return values
