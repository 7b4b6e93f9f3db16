"""The module that trains: an ICAE whose forward gives the loss of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icae_fast import ICAE
from icae_fast.activations import ActivationBudget
from training.objectives import OBJECTIVES


class TrainingModel(nn.Module):
    """Wraps an `ICAE` for a trainer: the forward takes a batch of `training.batch.pack` and gives its loss.

    Only the adapter asks for gradients. All of a step is one graph, so DDP's hooks, gradient accumulation and
    optimisers see nothing of what is computed twice.

    Args:
        icae: the model; its adapter is what is trained.
        budget: memory for what a step's backward would otherwise compute again.
    """

    def __init__(self, icae: ICAE, budget: ActivationBudget | None = None) -> None:
        super().__init__()
        self.icae = icae
        self.budget = budget or ActivationBudget()

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
    ) -> dict[str, Any]:
        """The loss of a batch.

            loss = sum of the labelled tokens' losses / num_items_in_batch

        Args:
            context_ids, context_lengths, prompt_answer_ids, prompt_lengths, labels, objectives, origins: see
                `training.batch.pack`.
            num_items_in_batch: labelled tokens of the whole optimiser step; those of this batch without it.

        Returns:
            `loss` () fp32; and detached, for each of `OBJECTIVES`, (3,): `sums` of the losses, `counts` of the labelled
            tokens, `correct` of those whose label had the highest logit.
        """
        del origins  # for messages

        def rows(ids, lengths):
            return ids.cpu().split(lengths.tolist())

        scored = self.icae.token_losses(
            rows(context_ids, context_lengths),
            rows(prompt_answer_ids, prompt_lengths),
            rows(labels, prompt_lengths),
            self.budget,
        )
        objective = objectives.cpu()[scored.rows].to(scored.losses.device)

        def by_objective(values):
            return values.new_zeros(len(OBJECTIVES)).index_add_(0, objective, values)

        losses = scored.losses.detach()
        return {
            "loss": scored.losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch),
            "sums": by_objective(losses),
            "counts": by_objective(torch.ones_like(losses)),
            "correct": by_objective(scored.correct.to(losses)),
        }
