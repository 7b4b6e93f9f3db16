"""Stages of a training run, typically of growing length and compression ratio.

A span holds at most `k * rate` tokens and always has k slots, so that contexts of 16, 32, ... tokens increase both the
length and the ratio. A new adapter learns to restore 32 tokens from 16 slots within hundreds of steps if it first
learned it for 16 tokens; from scratch it does not.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from icae_fast.checks import is_int
from icae_fast.config import ICAEConfig
from icae_fast.errors import ConfigError
from icae_fast.training.methods.objectives import OBJECTIVES

# Objectives of a stage that cannot be mixed with others, and the reason.
WARM, CODE = "warm", "code"
EXCLUSIVE = {WARM: "the warm start runs no decoder", CODE: "the slot code runs no encoder"}
STAGE_OBJECTIVES: tuple[str, ...] = (*OBJECTIVES, *EXCLUSIVE)


@dataclass(frozen=True)
class Stage:
    """Properties of the samples of consecutive optimiser steps.

    Args:
        steps: optimiser steps of the stage; the last stage of a curriculum does not end.
        objectives: relative weights for drawing a sample's objective from "ae", "lm" and "ft": `{"ae": 0.6, "lm":
            0.4}`. Or `{"warm": 1}`, the encoder-only warm start, or `{"code": 1}`, the decoder-only slot code, which
            cannot be mixed with others.
        max_tokens: context tokens of a sample, at most.
        min_tokens: context lengths are drawn from `min_tokens` to `max_tokens`, both included; None: all `max_tokens`.
        memory_sizes: numbers of slots per span, one of which is drawn for each micro-batch (the first k' of the
            adapter's k memory tokens); `()`: the adapter's k.
        wrong_tokens: 0 to 1, upper bound of the share of a text to restore that is replaced by other tokens in the
            decoder's input; 0 in evaluation.
        own_tokens: 0 to 1, share of the samples to restore in which the decoder reads its own guesses. Above 0, a step
            has an additional forward of encoder and decoder.
        learning_rate: peak rate of the stage; None: the run's. If any stage has one, the schedule (warm-up, decay)
            restarts with each stage.
        token_lr_factor: factor of the stage; None: the run's. It also makes the schedule restart with each stage.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    steps: int
    objectives: dict[str, float]
    max_tokens: int
    min_tokens: int | None = None
    memory_sizes: tuple[int, ...] = ()
    wrong_tokens: float = 0.0
    own_tokens: float = 0.0
    learning_rate: float | None = None
    token_lr_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "max_tokens", "min_tokens"):
            value = getattr(self, name)
            if not (name == "min_tokens" and value is None):
                _check_count(name, value)
        if self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}")
        object.__setattr__(self, "objectives", _checked_objectives(self.objectives))
        for name in ("learning_rate", "token_lr_factor"):
            value = getattr(self, name)
            if value is not None and not _is_positive(value):
                raise ConfigError(f"{name} is {value!r}; it must be a number above 0 (or be left out)")
        for name in ("wrong_tokens", "own_tokens"):
            if not _is_share(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a number from 0 to 1")
        sizes = self.memory_sizes
        if isinstance(sizes, (str, Mapping)) or not isinstance(sizes, Sequence):
            raise ConfigError(f"memory_sizes is {sizes!r}; give a list of numbers of slots, or an empty list for k")
        for size in sizes:
            _check_count("an entry of memory_sizes", size)
        object.__setattr__(self, "memory_sizes", tuple(sizes))

    @property
    def exclusive(self) -> str | None:
        """The objective of `EXCLUSIVE` that this stage trains, or None."""
        return next((name for name in EXCLUSIVE if name in self.objectives), None)

    @property
    def is_warm(self) -> bool:
        """Whether this stage trains only the encoder; see `icae_fast.training.methods.warm_start`."""
        return WARM in self.objectives

    @property
    def is_code(self) -> bool:
        """Whether this stage trains only a slot code; see `icae_fast.training.methods.slot_code`."""
        return CODE in self.objectives

    def draw_objective(self, rng: random.Random) -> str:
        """Return a random objective, with probability proportional to its weight."""
        return rng.choices(list(self.objectives), list(self.objectives.values()))[0]

    def draw_length(self, rng: random.Random) -> int:
        """Return a number of context tokens, uniform from `min_tokens` to `max_tokens`."""
        return rng.randint(self.min_tokens or self.max_tokens, self.max_tokens)

    def draw_memory_size(self, rng: random.Random) -> int | None:
        """Return a number of slots per span, uniform over `memory_sizes`; None for the adapter's k."""
        return rng.choice(self.memory_sizes) if self.memory_sizes else None

    def check(self, config: ICAEConfig) -> None:
        """Raise unless this stage can train an adapter of a config.

        Raises:
            ConfigError: a memory size is more than k, or does not divide a span's tokens, so that
                `ICAE.with_memory_size` could not cut the adapter to that size.
        """
        for size in self.memory_sizes:
            config.with_memory_size(size)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self) | {"memory_sizes": list(self.memory_sizes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Stage:
        """Return the stage with these fields, others at their defaults.

        Raises:
            ConfigError: a field is missing, unknown or out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a stage is {values!r}; give its fields: {', '.join(f.name for f in fields(cls))}")
        check_keys("a stage", values, [f.name for f in fields(cls)], ("steps", "objectives", "max_tokens"))
        return cls(**values)


class Curriculum:
    """Consecutive stages over optimiser steps from 0; the last stage does not end.

    Args:
        stages: at least one stage.

    Attributes:
        stages: tuple of the stages.

    Raises:
        ConfigError: there is no stage.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.stages = tuple(stages)
        if not self.stages:
            raise ConfigError("the curriculum has no stage; give at least one")
        self._ends: list[int] = []
        for stage in self.stages[:-1]:
            self._ends.append(stage.steps + (self._ends[-1] if self._ends else 0))
        self._ends.append(sys.maxsize)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages, including the last one's `steps`."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, Stage]:
        """Return (index, stage) of an optimiser step, counted from 0.

        Raises:
            ValueError: step is negative.
        """
        if step < 0:
            raise ValueError(f"step is {step}; steps are counted from 0")
        index = next(i for i, end in enumerate(self._ends) if step < end)
        return index, self.stages[index]

    def ends(self, step: int) -> int:
        """Return the first step after the stage of `step`; `sys.maxsize` in the last stage."""
        return self._ends[self.stage_at(step)[0]]

    def first_encoder_step(self) -> int:
        """Return the first optimiser step, counted from 0, that trains the encoder; `sys.maxsize` if none does."""
        starts = [0, *self._ends[:-1]]
        return next((n for n, s in zip(starts, self.stages, strict=True) if not s.is_code), sys.maxsize)

    @property
    def has_rates(self) -> bool:
        """Whether a stage has a learning rate or a token factor."""
        return any(s.learning_rate is not None or s.token_lr_factor is not None for s in self.stages)

    def check(self, config: ICAEConfig) -> None:
        """Raise unless the stages can train an adapter of a config; see `Stage.check`.

        Raises:
            ConfigError: names the stage, counted from 0.
        """
        for i, stage in enumerate(self.stages):
            try:
                stage.check(config)
            except ConfigError as error:
                raise ConfigError(f"stage {i}: {error}") from error

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return all stages as JSON values, for `from_dicts`."""
        return [stage.to_dict() for stage in self.stages]

    @classmethod
    def from_dicts(cls, stages: Sequence[Mapping[str, Any]]) -> Curriculum:
        """Return the curriculum of these stages, given as in a config file.

        Raises:
            ConfigError: names the stage, counted from 0, and its problem.
        """
        if isinstance(stages, (str, Mapping)) or not isinstance(stages, Sequence):
            raise ConfigError(f"stages is {stages!r}; give a list of stages")
        made = []
        for i, values in enumerate(stages):
            try:
                made.append(Stage.from_dict(values))
            except ConfigError as error:
                raise ConfigError(f"stage {i}: {error}") from error
        return cls(made)

    @classmethod
    def growing(
        cls,
        lengths: Sequence[tuple[int, int]],
        objectives: Mapping[str, float] | None = None,
        *,
        warm_steps: int = 0,
        shortest: float = 1.0,
        memory_sizes: Sequence[int] = (),
    ) -> Curriculum:
        """Return the common case: the same objectives at growing lengths, after a warm start.

        `growing([(16, 60), (32, 160), (64, 1000)], warm_steps=60)` is 60 steps of warm start at 16 tokens, then 60
        steps at 16, 160 at 32, and 64 tokens from there on.

        Args:
            lengths: (context tokens, optimiser steps) of each stage.
            objectives: objectives of all stages, default autoencoding only.
            warm_steps: preceding steps of warm start, at the first stage's length. Default 0.
            shortest: context lengths are drawn from this share of a stage's tokens up to all of them. Default 1.
            memory_sizes: memory sizes of all stages, default the adapter's k.

        Raises:
            ConfigError: a value is out of range, or there is no length.
        """
        if not 0 < shortest <= 1:
            raise ConfigError(f"shortest is {shortest!r}; it must be a number above 0 and at most 1")
        objectives = dict(objectives or {"ae": 1.0})

        def stage(tokens: int, steps: int, objectives: Mapping[str, float]) -> Stage:
            _check_count("a length", tokens)
            least = None if shortest == 1 else max(1, math.ceil(tokens * shortest))
            return Stage(steps, dict(objectives), tokens, least, tuple(memory_sizes))

        warm = [stage(lengths[0][0], warm_steps, {WARM: 1.0})] if warm_steps and lengths else []
        return cls([*warm, *(stage(tokens, steps, objectives) for tokens, steps in lengths)])


def check_keys(what: str, values: Mapping[str, Any], known: Sequence[str], required: Iterable[str] = ()) -> None:
    """Raise unless a mapping has all required keys and no unknown one.

    Raises:
        ConfigError: names the keys and, for an unknown one, the closest known key.
    """
    if missing := [name for name in required if name not in values]:
        raise ConfigError(f"{what} lacks {', '.join(missing)}; its fields are {', '.join(known)}")
    for name in values:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}? The" if near else "the"
            raise ConfigError(f"{what} has the unknown field {name}; {hint} fields are {', '.join(known)}")


def _check_count(name: str, value: Any) -> None:
    if not is_int(value) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _checked_objectives(objectives: Any) -> dict[str, float]:
    if not isinstance(objectives, Mapping) or not objectives:
        raise ConfigError(f"objectives is {objectives!r}; give weights such as {{'ae': 0.6, 'lm': 0.4}}")
    check_keys("objectives", objectives, STAGE_OBJECTIVES)
    for name, weight in objectives.items():
        if not _is_positive(weight):
            raise ConfigError(f"the weight of {name!r} is {weight!r}; it must be a number above 0 (or be left out)")
    for name, why in EXCLUSIVE.items():
        if name in objectives and len(objectives) > 1:
            raise ConfigError(f"objectives mixes {name!r} with others; {why}, so give it a separate stage")
    return {name: float(weight) for name, weight in objectives.items()}
