"""Knowledge distillation from the base model that reads the whole context.

The teacher is the frozen base model. It reads a sample with the context's tokens in place of the slots, and without AE,
LM and FT, which it does not know:

    student   template, slots, FT, prompt, template, answer
    teacher   template, context tokens, prompt, template, answer

and each labelled token has the loss

    (1 - alpha) * CE + alpha * tau^2 * KL(teacher || student),   both softened by a temperature tau

Source: Hinton et al., arXiv 1503.02531, section 2, which derives the factor tau^2: gradients keep their size for every
tau.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from icae_fast.backbone.rows import micro_batches, pack_ends
from icae_fast.backbone.sharding import least_of_all
from icae_fast.checks import is_int
from icae_fast.core.core import ICAECore
from icae_fast.errors import ConfigError, ContextTooLongError, InvalidInputError
from icae_fast.step.labels import IGNORE
from icae_fast.step.layout import copy_once
from icae_fast.training.methods.batch import Batch
from icae_fast.training.methods.curriculum import check_keys
from icae_fast.training.methods.objectives import OBJECTIVES, Objective

TooLong = Literal["stop", "skip"]


@dataclass(frozen=True)
class Distillation:
    """Weight of the teacher in the loss, and the samples that have one.

    Args:
        alpha: weight of the divergence from the teacher, 0 to 1; 0 is no distillation.
        temperature: tau, the divisor of both models' logits.
        objectives: objectives of the samples with a teacher. By default autoencoding samples have none, because the
            text tells as much as a model that repeats it.
        too_long: treatment of a sample whose teacher needs more positions than the model has: `"stop"` raises, `"skip"`
            trains on it without a teacher and counts it.
        token_budget: tokens of one forward of the teacher, which bounds its working memory; a longer row runs
            separately.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
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
            raise ConfigError(f"the distillation's temperature is {self.temperature!r}; it must be a number above 0")
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
        """Return the settings with these fields, others at their defaults.

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
    """The teacher's input for a batch.

    Args:
        ids: (T_i,) int64 of each row with a teacher, up to the last token that predicts a label.
        wanted: (N_i,) int64, increasing: positions in `ids[i]` whose next token is labelled.
        covered: (N,) bool over the labelled tokens of all rows of the batch in order, True where `wanted` has the
            token; for `icae_fast.step.loss.Teacher`.
        n_too_long: rows without a teacher because they are too long.
    """

    ids: list[torch.Tensor]
    wanted: list[torch.Tensor]
    covered: torch.Tensor
    n_too_long: int


def teacher_rows(icae: ICAECore, batch: Batch, settings: Distillation) -> TeacherRows:
    """Return the teacher's rows: memory ids replaced by the context, AE, LM and FT removed, labels located again.

    A label on a row's first token, which nothing predicts, does not count, as in `ICAE.forward`.

    Args:
        icae: the model; its vocabulary and positions are used.
        batch: packed batch.
        settings: settings that select the rows with a teacher.

    Raises:
        InvalidInputError: memory ids of a row are missing or not contiguous.
        ContextTooLongError: a row needs more than `icae.max_positions`, and `too_long` is "stop".
    """
    ids, wanted, covered, n_too_long = [], [], [], 0
    for i, (context, prompt, labels) in enumerate(zip(batch.contexts, batch.prompts, batch.label_rows, strict=True)):
        labelled = (labels[1:] != IGNORE).nonzero()[:, 0] + 1
        has_teacher = batch.objectives[i] in settings.objectives and len(labelled) > 0
        if has_teacher:
            what = batch.origins[i] or f"row {i}"
            row, positions = _teacher_row(icae, context, prompt, labelled, what)
            if len(row) > icae.max_positions:
                _check_too_long(settings, what, len(row), icae.max_positions)
                has_teacher, n_too_long = False, n_too_long + 1
            else:
                ids.append(row)
                wanted.append(positions)
        covered.append(torch.full((len(labelled),), has_teacher))
    return TeacherRows(ids, wanted, torch.cat(covered), n_too_long)


def _teacher_row(
    icae: ICAECore, context: torch.Tensor, prompt: torch.Tensor, labelled: torch.Tensor, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a row's teacher ids, and the positions in them before each labelled token."""
    is_memory = icae.vocabulary.is_memory(prompt)
    places = is_memory.nonzero()[:, 0]
    if len(places) == 0 or int(places[-1] - places[0]) + 1 != len(places):
        raise InvalidInputError(f"{what} has no memory ids, or scattered ones; they must be contiguous for a teacher")
    first = int(places[0])
    kept = ~is_memory & (prompt < icae.vocabulary.first_memory)  # AE, LM and FT come after the memory ids
    row = torch.cat((prompt[:first], context, prompt[first:][kept[first:]]))
    moved = kept.cumsum(0) - kept.long() + len(context) * (torch.arange(len(prompt)) > first)
    positions = moved[labelled] - 1
    return row[: int(positions[-1]) + 1], positions


def _check_too_long(settings: Distillation, what: str, n: int, limit: int) -> None:
    if settings.too_long == "stop":
        raise ContextTooLongError(
            f"the teacher of {what} would read {n} tokens, but the base model has {limit} positions; shorten contexts, "
            "set too_long: skip, or set icae.max_positions higher if the base model extrapolates"
        )


@torch.no_grad()
def teacher_hidden(icae: ICAECore, teacher: TeacherRows, token_budget: int = 4096) -> torch.Tensor:
    """Return the frozen base model's final hidden states that predict the labelled tokens, without a graph.

    Only these are kept, and no logits are computed: the loss applies the head.

    Args:
        icae: the model.
        teacher: result of `teacher_rows`.
        token_budget: see `Distillation`, default 4096.

    Returns:
        (covered tokens, d) in the model's dtype, in the order of the batch's labelled tokens.
    """
    parts = [icae.embed(torch.empty(0, dtype=torch.int64))]  # (0, d): a batch may have no teacher at all
    batches = list(micro_batches([len(row) for row in teacher.ids], token_budget))
    passes = -least_of_all([-len(batches)], icae.device)[0] if icae.backbone.is_sharded else len(batches)
    lengths = [len(row) for row in teacher.ids]
    counts = [len(row) - int(positions[0]) for row, positions in zip(teacher.ids, teacher.wanted, strict=True)]
    on_device = copy_once(icae.device, *teacher.ids, *(p - p[0] for p in teacher.wanted))
    for chosen in batches:
        own = [counts[i] for i in chosen]
        rows = pack_ends([lengths[i] for i in chosen], own).to(icae.device)
        hidden = icae.backbone.forward(icae.embed(torch.cat([on_device[i] for i in chosen])), rows).split(own)
        parts += [h[on_device[len(lengths) + i]] for h, i in zip(hidden, chosen, strict=True)]
    for _ in range(len(batches), passes):
        icae.backbone.stand_by(1)  # teachers of other processes run more forwards
    return torch.cat(parts)


def distillation_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    alpha: float,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return the loss of each labelled token, in plain torch: the reference for a fused loss.

    Args:
        logits: (N, vocabulary) logits of the student.
        teacher_logits: (N, vocabulary) logits of the teacher.
        targets: (N,) int64 labels.
        alpha: weight of the divergence.
        temperature: tau, default 1.

    Returns:
        (N,) fp32, or fp64 for fp64 logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, teacher_logits = logits.to(dtype), teacher_logits.to(dtype)
    student, teacher = (F.log_softmax(x / temperature, dim=-1) for x in (logits, teacher_logits))
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return (1 - alpha) * F.cross_entropy(logits, targets, reduction="none") + alpha * temperature**2 * divergence
