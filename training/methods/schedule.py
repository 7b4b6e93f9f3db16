"""Learning rates: that of tokens apart from the rest, and schedules that restart with each stage of a curriculum."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainingArguments, get_scheduler

from icae_fast.errors import ConfigError
from icae_fast.training.methods.curriculum import Curriculum, Stage
from icae_fast.training.methods.soap import Soap

Factor = Callable[[int], float]


def two_group_optimizer(
    model: nn.Module,
    kind: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    weight_decay: float,
    token_lr_factor: float,
    soap: bool,
) -> torch.optim.Optimizer:
    """Return an optimiser with a group for tokens and gain, which have their own rate, and one for the rest.

    Args:
        model: model whose trained parameters are optimised.
        kind: class of the optimiser.
        options: its keyword arguments, among them `lr`.
        weight_decay: decay of both groups.
        token_lr_factor: rate of tokens and gain, relative to `lr`.
        soap: use `Soap` in place of `kind`, for LoRA's matrices only.
    """
    tokens: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_token = name.endswith(("memory_token_embed.weight", "slot_gain"))
            (tokens if is_token else others).append(parameter)
    decay, faster = {"weight_decay": weight_decay}, options["lr"] * token_lr_factor
    of_tokens: dict[str, int] = {}
    if soap:  # rows of an embedding must not be mixed
        kind, options, of_tokens = Soap, {n: options[n] for n in ("lr", "betas", "eps")}, {"max_basis": 0}
    groups = [{"params": others, **decay}, {"params": tokens, "lr": faster, **decay, **of_tokens}]
    return kind(groups, **options)


def stage_schedule(
    optimizer: torch.optim.Optimizer, arguments: TrainingArguments, curriculum: Curriculum, token_lr_factor: float
) -> LambdaLR:
    """Return a schedule that restarts with each stage, at the stage's rate.

        rate(step) = stage's learning_rate * shape((step - stage's first) of the stage's steps)

    The shape is transformers' `lr_scheduler_type` with its warm-up and keywords, over the steps of one stage. A second
    parameter group (tokens and gain) has this rate times the `token_lr_factor` of the stage, or of the run.

    Args:
        optimizer: optimiser with one or two parameter groups; their present rates are those of the run.
        arguments: training arguments that set the kind of schedule.
        curriculum: stages; a stage without a rate uses the run's.
        token_lr_factor: factor of the run.

    Raises:
        ConfigError: the kind of schedule depends on more than the step.
    """
    shapes = [_shape(arguments, stage.steps) for stage in curriculum.stages]
    starts = [0, *accumulate(stage.steps for stage in curriculum.stages)]

    def factor(own: Callable[[Stage], float]) -> Factor:
        def at(step: int) -> float:
            index, stage = curriculum.stage_at(step)
            return own(stage) * shapes[index](step - starts[index])

        return at

    def rate(stage: Stage) -> float:
        return (stage.learning_rate or arguments.learning_rate) / arguments.learning_rate

    def token_rate(stage: Stage) -> float:
        return rate(stage) * (stage.token_lr_factor or token_lr_factor) / token_lr_factor

    return LambdaLR(optimizer, [factor(own) for own in (rate, token_rate)[: len(optimizer.param_groups)]])


def _shape(arguments: TrainingArguments, steps: int) -> Factor:
    """Return the factor of the learning rate over the steps of one stage, from transformers' schedule."""
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kind, options = SchedulerType(arguments.lr_scheduler_type), arguments.lr_scheduler_kwargs
    assert not isinstance(options, str)  # `TrainingArguments` parses text
    made = get_scheduler(
        kind, nothing, num_warmup_steps=arguments.get_warmup_steps(steps), num_training_steps=steps,
        scheduler_specific_kwargs=options,
    )  # fmt: skip
    if not isinstance(made, LambdaLR):
        raise ConfigError(
            f"train.lr_scheduler_type {kind.value!r} cannot restart with each stage; choose "
            "another one, or remove learning_rate from the stages"
        )
    return made.lr_lambdas[0]
