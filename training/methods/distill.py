"""Knowledge distillation from the full-context model: what it would say of the answer, had it read the text itself.

The teacher is the frozen base model. It reads a sample with the context's tokens where the memory's slots are, and
without AE, LM and FT, which it does not know:

    student   template, slots, FT, prompt, template, answer
    teacher   template, context tokens, prompt, template, answer

and each labelled token has the loss

    (1 - alpha) * CE + alpha * tau^2 * KL(teacher || student),   both softened by a temperature tau

Source: Hinton et al., arXiv 1503.02531, section 2, which gives the factor tau^2: gradients keep their size for every
tau.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from icae_fast import ICAE
from icae_fast.backbone.rows import micro_batches, pack_ends
from icae_fast.backbone.sharding import least_of_all
from icae_fast.checks import is_int
from icae_fast.errors import ConfigError, ContextTooLongError, InvalidInputError
from icae_fast.step.labels import IGNORE
from icae_fast.training.methods.batch import Batch
from icae_fast.training.methods.curriculum import check_keys
from icae_fast.training.methods.objectives import OBJECTIVES, Objective

TooLong = Literal["stop", "skip"]


@dataclass(frozen=True)
class Distillation:
    """How much of the loss comes from the teacher, and for which samples.

    Args:
        alpha: weight of the divergence from the teacher, 0 to 1; 0 is no distillation.
        temperature: tau, by which the logits of both are divided.
        objectives: those of the samples that have a teacher. Autoencoding ones have none by default: to a model that
            sees the text, repeating it tells no more than the text does.
        too_long: what becomes of a sample whose teacher would need more positions than the model has: `"stop"` raises,
            `"skip"` trains on it without a teacher, and counts it.
        token_budget: tokens that the teacher reads in one forward, which bounds its working memory; a longer row goes
            alone.

    Raises:
        ConfigError: a value is of the wrong kind or out of range.
    """

    alpha: float = 0.0
    temperature: float = 1.0
    objectives: tuple[Objective, ...] = ("lm", "ft")
    too_long: TooLong = "stop"
    token_budget: int = 4096

    def __post_init__(self) -> None:
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise ConfigError(f"the distillation's alpha is {self.alpha!r}; it must be a number from 0 to 1")
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise ConfigError(f"the distillation's temperature is {self.temperature!r}; it must be a number over 0")
        chosen = self.objectives
        listed = isinstance(chosen, Sequence) and not isinstance(chosen, str) and len(chosen) > 0
        if not listed or any(name not in OBJECTIVES for name in chosen):
            raise ConfigError(f"the distillation's objectives are {chosen!r}; give some of {', '.join(OBJECTIVES)}")
        object.__setattr__(self, "objectives", tuple(chosen))
        if self.too_long not in get_args(TooLong):
            raise ConfigError(f"too_long is {self.too_long!r}; it must be one of {', '.join(get_args(TooLong))}")
        if not is_int(self.token_budget) or self.token_budget < 1:
            raise ConfigError(f"token_budget is {self.token_budget!r}; it must be a whole number of at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Distillation:
        """The settings with these fields, the others at their defaults.

        Raises:
            ConfigError: a field is unknown or out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"distillation is {values!r}; give fields such as {{'alpha': 0.5}}")
        check_keys("distillation", values, [f.name for f in fields(cls)])
        return cls(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class TeacherRows:
    """What the teacher reads of a batch.

    Args:
        ids: (T_i,) int64 of each row that has a teacher, up to its last token that predicts a labelled one.
        wanted: (N_i,) int64, rising: positions in `ids[i]` whose next token is labelled.
        covered: (N,) bool over the labelled tokens of all rows of the batch in order, True where `wanted` has it; for
            `icae_fast.step.loss.Teacher`.
        n_too_long: rows without a teacher because they were too long.
    """

    ids: list[torch.Tensor]
    wanted: list[torch.Tensor]
    covered: torch.Tensor
    n_too_long: int


def teacher_rows(icae: ICAE, batch: Batch, settings: Distillation) -> TeacherRows:
    """Replaces memory ids by the context's tokens, leaves AE, LM and FT out, and finds the labelled tokens again.

    A label at a row's very beginning, which nothing predicts, does not count, as in `ICAE.forward`.

    Args:
        icae: gives ids, and positions of the base model.
        batch: see `icae_fast.training.methods.batch.pack`.
        settings: which rows have a teacher.

    Raises:
        InvalidInputError: memory ids of a row are missing or scattered.
        ContextTooLongError: a row needs more than `icae.max_positions`, and settings say to stop.
    """
    contexts = batch["context_ids"].cpu().split(batch["context_lengths"].tolist())
    prompts, labels = (batch[n].cpu().split(batch["prompt_lengths"].tolist()) for n in ("prompt_answer_ids", "labels"))
    objectives = [OBJECTIVES[i] for i in batch["objectives"].tolist()]
    ids, wanted, covered, n_too_long = [], [], [], 0
    for i, (context, prompt, row_labels) in enumerate(zip(contexts, prompts, labels, strict=True)):
        labelled = (row_labels[1:] != IGNORE).nonzero()[:, 0] + 1
        has_teacher = objectives[i] in settings.objectives and len(labelled) > 0
        if has_teacher:
            what = batch["origins"][i] or f"row {i}"
            row, positions = _teacher_row(icae, context, prompt, labelled, what)
            if len(row) > icae.max_positions:
                _check_too_long(settings, what, len(row), icae.max_positions)
                has_teacher, n_too_long = False, n_too_long + 1
            else:
                ids.append(row)
                wanted.append(positions)
        covered.append(torch.full((len(labelled),), has_teacher))
    return TeacherRows(ids, wanted, torch.cat(covered), n_too_long)


def _teacher_row(icae, context, prompt, labelled, what):
    """A row's teacher ids, and the positions in them before each labelled token."""
    is_memory = icae.vocabulary.is_memory(prompt)
    places = is_memory.nonzero()[:, 0]
    if len(places) == 0 or int(places[-1] - places[0]) + 1 != len(places):
        raise InvalidInputError(
            f"{what} has no memory ids, or scattered ones; the teacher reads the context in one piece"
        )
    first = int(places[0])
    kept = ~is_memory & (prompt < icae.vocabulary.first_memory)  # AE, LM and FT come after the memory ids
    row = torch.cat((prompt[:first], context, prompt[first:][kept[first:]]))
    moved = kept.cumsum(0) - kept.long() + len(context) * (torch.arange(len(prompt)) > first)
    positions = moved[labelled] - 1
    return row[: int(positions[-1]) + 1], positions


def _check_too_long(settings, what, n, limit):
    if settings.too_long == "stop":
        raise ContextTooLongError(
            f"the teacher of {what} would read {n} tokens, but the base model has {limit} positions; shorten contexts, "
            "set too_long: skip, or set icae.max_positions higher if the base model extrapolates"
        )


@torch.no_grad()
def teacher_hidden(icae: ICAE, teacher: TeacherRows, token_budget: int = 4096) -> torch.Tensor:
    """The frozen base model's final hidden states that predict the labelled tokens, without a graph.

    Nothing but these is kept, and no logits are made: the head is applied with the loss.

    Args:
        icae: the model.
        teacher: what `teacher_rows` gave.
        token_budget: see `Distillation`.

    Returns:
        (covered tokens, d) in the model's dtype, in the order of the batch's labelled tokens.
    """
    parts = [icae.embed(torch.empty(0, dtype=torch.int64))]  # (0, d): a batch may have no teacher at all
    batches = list(micro_batches([len(row) for row in teacher.ids], token_budget))
    passes = -least_of_all([-len(batches)], icae.device)[0] if icae.backbone.is_sharded else len(batches)
    for chosen in batches:
        ids, wanted = ([rows[i] for i in chosen] for rows in (teacher.ids, teacher.wanted))
        counts = [len(row) - int(positions[0]) for row, positions in zip(ids, wanted, strict=True)]
        rows = pack_ends(list(map(len, ids)), counts).to(icae.device)
        hidden = icae.backbone.forward(icae.embed(torch.cat(ids)), rows).split(counts)
        parts += [h[(p - p[0]).to(icae.device)] for h, p in zip(hidden, wanted, strict=True)]
    for _ in range(len(batches), passes):
        icae.backbone.stand_by(1)  # other processes' teachers read more
    return torch.cat(parts)


def distillation_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    alpha: float,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The loss of each labelled token, see the head of this file, in plain torch: what a fused loss is held against.

    Args:
        logits: (N, vocabulary) of the student.
        teacher_logits: (N, vocabulary).
        targets: (N,) int64.
        alpha: weight of the divergence.
        temperature: tau.

    Returns:
        (N,) fp32, or fp64 for fp64 logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, teacher_logits = logits.to(dtype), teacher_logits.to(dtype)
    student, teacher = (F.log_softmax(x / temperature, dim=-1) for x in (logits, teacher_logits))
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return (1 - alpha) * F.cross_entropy(logits, targets, reduction="none") + alpha * temperature**2 * divergence
