"""The module that trains: an ICAE whose forward gives the loss of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icae_fast import ICAE
from icae_fast.core.spans import slots_per_span
from icae_fast.step.budget import ActivationBudget
from icae_fast.step.labels import IGNORE
from icae_fast.step.loss import Teacher
from icae_fast.step.training_step import TrainingStep
from icae_fast.training.methods.batch import Batch
from icae_fast.training.methods.curriculum import ALONE, CODE, WARM
from icae_fast.training.methods.distill import Distillation, teacher_hidden, teacher_rows
from icae_fast.training.methods.objectives import OBJECTIVES
from icae_fast.training.methods.slot_code import SlotCode
from icae_fast.training.methods.warm_start import warm_start_loss

NAMES = (*OBJECTIVES, *ALONE)


class TrainingModel(nn.Module):
    """Wraps an `ICAE` for a trainer: the forward takes a batch of `icae_fast.training.methods.batch.pack` and gives
    its loss.

    Only the adapter asks for gradients. All of a step is one graph, so DDP's hooks, gradient accumulation and
    optimisers see nothing of what is computed twice.

    Args:
        icae: the model; its adapter is what is trained.
        budget: memory for what a step's backward would otherwise compute again.
        distillation: from the base model that reads the whole context; none by default.
        code: of slots, which is trained by batches that ask for it, and gives a warm start its targets.
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
        alone: str | None = None,
        own_tokens: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """The loss of a batch.

            loss = sum of the labelled tokens' losses / num_items_in_batch

        Args:
            context_ids, context_lengths, prompt_answer_ids, prompt_lengths, labels, objectives, origins: see
                `icae_fast.training.methods.batch.pack`.
            num_items_in_batch: labelled tokens of the whole optimiser step, or its slots in a warm start; those of this
                batch without it.
            memory_size: slots a span, the first k' of the k.
            alone: "warm" for the encoder-only loss of `icae_fast.training.methods.warm_start` instead, summed over
            slots; "code" for
                slots by `code`, without an encoder.
            own_tokens: see `icae_fast.training.methods.batch.pack`; what the decoder guesses there, having read the
            right tokens before,
                is found by a forward without a graph, and read in place of the right ones. EOS is never read. Where the
                base model is sharded, the batches of all processes have it or none has, as they run as many forwards.

        Returns:
            `loss` () fp32; and detached, for each of `NAMES`, (5,): `sums` of the losses, `counts` of the labelled
            tokens or slots, `correct` of those whose label had the highest logit, or whose target was the nearest;
            and `without_teacher`, the number of rows that were too long for one.
        """
        contexts, prompts, targets = (
            ids.cpu().split(lengths.tolist())
            for ids, lengths in (
                (context_ids, context_lengths), (prompt_answer_ids, prompt_lengths), (labels, prompt_lengths),
            )
        )  # fmt: skip
        if alone == WARM:
            return self._warm(contexts, memory_size, num_items_in_batch)
        slots, teacher, without = None, None, 0
        if alone == CODE:
            slots = self.code.slots(self.icae, contexts, slots_per_span(self.icae.config, memory_size))
        elif self.distillation.alpha > 0 and self.training:
            batch = {
                "context_ids": context_ids, "context_lengths": context_lengths, "labels": labels,
                "prompt_answer_ids": prompt_answer_ids, "prompt_lengths": prompt_lengths, "objectives": objectives,
                "origins": origins or [""] * len(context_lengths),
            }  # fmt: skip
            teacher, without = self._teacher(batch)
        if own_tokens is not None:
            prompts = self._with_guesses(contexts, prompts, targets, own_tokens.cpu(), memory_size, slots)
        scored = self.icae.token_losses(contexts, prompts, targets, self.budget, memory_size, teacher, slots)
        objective = objectives.cpu()[scored.rows].to(scored.losses.device)
        if alone:
            objective.fill_(NAMES.index(alone))

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

    @torch.no_grad()
    def _with_guesses(self, contexts, prompts, targets, own, memory_size, slots):
        """The prompts, with the decoder's guesses where `own` (P,) asks for them."""
        guesses = self.icae.token_guesses(contexts, prompts, targets, memory_size, slots).cpu()
        ids, labels, lengths = torch.cat(prompts), torch.cat(targets), [len(p) for p in prompts]
        labelled = labels != IGNORE
        labelled[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = False  # nothing predicts a row's first token
        read = ids.masked_scatter(labelled, guesses)
        ends = torch.isin(read, torch.tensor(self.icae.eos_token_ids))
        return torch.where(own & labelled & ~ends, read, ids).split(lengths)

    def _teacher(self, batch: Batch) -> tuple[Teacher, int]:
        """The teacher of a batch, and how many rows were too long for one."""
        own = self.distillation
        rows = teacher_rows(self.icae, batch, own)
        hidden = teacher_hidden(self.icae, rows, own.token_budget)
        return Teacher(hidden, rows.covered, own.alpha, own.temperature), rows.n_too_long

    def _warm(self, contexts, memory_size, num_items_in_batch):
        slots = TrainingStep(self.icae, contexts, 0, self.budget, memory_size).encode()
        found = warm_start_loss(self.icae, contexts, slots, memory_size, self.code)

        def own(value):
            values = found.loss.new_zeros(len(NAMES))
            values[NAMES.index(WARM)] = value
            return values

        return {
            "loss": found.loss / (found.n_slots if num_items_in_batch is None else num_items_in_batch),
            "sums": own(found.loss.detach()),
            "counts": own(found.n_slots),
            "correct": own(found.n_right),
            "without_teacher": 0,
        }
