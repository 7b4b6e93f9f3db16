"""The module that trains: an ICAE whose forward gives the loss of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icae_fast import ICAE
from icae_fast.activations import ActivationBudget
from icae_fast.loss import Teacher
from icae_fast.training_step import TrainingStep
from training.batch import Batch
from training.curriculum import WARM
from training.distill import Distillation, teacher_hidden, teacher_rows
from training.objectives import OBJECTIVES
from training.warm_start import warm_start_loss

NAMES = (*OBJECTIVES, WARM)


class TrainingModel(nn.Module):
    """Wraps an `ICAE` for a trainer: the forward takes a batch of `training.batch.pack` and gives its loss.

    Only the adapter asks for gradients. All of a step is one graph, so DDP's hooks, gradient accumulation and
    optimisers see nothing of what is computed twice.

    Args:
        icae: the model; its adapter is what is trained.
        budget: memory for what a step's backward would otherwise compute again.
        distillation: from the base model that reads the whole context; none by default.
    """

    def __init__(
        self, icae: ICAE, budget: ActivationBudget | None = None, distillation: Distillation | None = None
    ) -> None:
        super().__init__()
        self.icae = icae
        self.budget = budget or ActivationBudget()
        self.distillation = distillation or Distillation()

    def forward(
        self,
        context_ids: torch.Tensor,
        context_lengths: torch.Tensor,
        prompt_answer_ids: torch.Tensor,
        prompt_lengths: torch.Tensor,
        labels: torch.Tensor,
        objectives: torch.Tensor,
        origins: list[str] | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        memory_size: int | None = None,
        warm: bool = False,
    ) -> dict[str, Any]:
        """The loss of a batch.

            loss = sum of the labelled tokens' losses / num_items_in_batch

        Args:
            context_ids, context_lengths, prompt_answer_ids, prompt_lengths, labels, objectives, origins: see
                `training.batch.pack`.
            num_items_in_batch: labelled tokens of the whole optimiser step, or its slots in a warm start; those of this
                batch without it.
            memory_size: slots a span, the first k' of the k.
            warm: the encoder-only loss of `training.warm_start` instead, summed over slots; no decoder runs.

        Returns:
            `loss` () fp32; and detached, for each of `OBJECTIVES` and the warm start, (4,): `sums` of the losses,
            `counts` of the labelled tokens or slots, `correct` of those whose label had the highest logit, or whose
            target was the nearest; and `without_teacher`, the number of rows that were too long for one.
        """
        contexts, prompts, targets = (
            ids.cpu().split(lengths.tolist())
            for ids, lengths in (
                (context_ids, context_lengths), (prompt_answer_ids, prompt_lengths), (labels, prompt_lengths),
            )
        )  # fmt: skip
        if warm:
            return self._warm(contexts, memory_size, num_items_in_batch)
        teacher, without = None, 0
        if self.distillation.alpha > 0 and self.training:
            batch = {
                "context_ids": context_ids, "context_lengths": context_lengths, "labels": labels,
                "prompt_answer_ids": prompt_answer_ids, "prompt_lengths": prompt_lengths, "objectives": objectives,
                "origins": origins or [""] * len(context_lengths),
            }  # fmt: skip
            teacher, without = self._teacher(batch)
        scored = self.icae.token_losses(contexts, prompts, targets, self.budget, memory_size, teacher)
        objective = objectives.cpu()[scored.rows].to(scored.losses.device)

        def by_objective(values):
            return values.new_zeros(len(NAMES)).index_add_(0, objective, values)

        losses = scored.losses.detach()
        return {
            "loss": scored.losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch),
            "sums": by_objective(losses),
            "counts": by_objective(torch.ones_like(losses)),
            "correct": by_objective(scored.correct.to(losses)),
            "without_teacher": without,
        }

    def _teacher(self, batch: Batch) -> tuple[Teacher, int]:
        """The teacher of a batch, and how many rows were too long for one."""
        own = self.distillation
        rows = teacher_rows(self.icae, batch, own)
        hidden = teacher_hidden(self.icae, rows, own.token_budget)
        return Teacher(hidden, rows.covered, own.alpha, own.temperature), rows.n_too_long

    def _warm(self, contexts, memory_size, num_items_in_batch):
        slots = TrainingStep(self.icae, contexts, 0, self.budget, memory_size).encode()
        found = warm_start_loss(self.icae, contexts, slots, memory_size)

        def last(value):
            return torch.stack([found.loss.new_zeros(())] * len(OBJECTIVES) + [torch.as_tensor(value).to(found.loss)])

        return {
            "loss": found.loss / (found.n_slots if num_items_in_batch is None else num_items_in_batch),
            "sums": last(found.loss.detach()),
            "counts": last(found.n_slots),
            "correct": last(found.n_right),
            "without_teacher": 0,
        }
