"""Settings of a training run: the sections of its YAML file.

`icae_fast.training.loop.settings_file` reads and checks a file. `docs/settings.md` lists every key; it is generated
from the fields and docstrings of these classes (`python -m docs.settings`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, create_model
from transformers import TrainingArguments

from icae_fast import ICAEConfig
from icae_fast.io.bundled import BUNDLED_NAME
from icae_fast.io.files import write_atomically
from icae_fast.step.budget import ActivationBudget
from icae_fast.training.loop.arguments import DEFAULTS, TrainSection
from icae_fast.training.methods.curriculum import Curriculum
from icae_fast.training.methods.distill import Distillation

SETTINGS_FILE = "settings.yaml"


Sources = str | dict[str, Any] | list[str | dict[str, Any]]


class Section(BaseModel):
    """Base class of the sections: frozen, strictly typed, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=False)


class ModelSection(Section):
    """The base model, and the adapter to start from.

    Args:
        name: base model: a path, a hub id, or the name of the bundled SmolLM2.
        revision: revision of the base model on the hub.
        dtype: dtype of the base model and of the computation; adapters are trained in fp32.
        adapter: folder or hub id of a saved adapter to continue from, with its config; null for a new adapter.
        max_positions: positions that the decoder may use, at most; null for the base model's own limit. A larger value
            trains the base model where it has to extrapolate.
    """

    name: str = BUNDLED_NAME
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    adapter: str | None = None
    max_positions: int | None = Field(default=None, ge=1)


class DataSection(Section):
    """The rows that are read, and how they are packed into optimiser steps.

    Args:
        train: sources of training rows, one or a list: a path, or the fields of a data source.
        eval: sources of held-out rows, like `train`; null for no evaluation.
        on_bad_row: "skip" logs and counts a row that cannot be used, "stop" ends the run at the first one.
        tokens_per_step: context and decoder tokens of one optimiser step, over all processes.
        micro_batch_tokens: context and decoder tokens of one forward and backward.
        spans: [low, high], the range from which the number of spans of a pretraining excerpt is drawn, up to the
            stage's `max_tokens`; null draws lengths by the stage only.
        excerpts_per_document: "all" cuts a document into consecutive excerpts, "one" takes one per epoch.
        max_target_tokens: tokens of a continuation, at most; null for the length of its excerpt.
        lm_token: put the LM token after the slots of a continuation.
        max_context_tokens: context tokens of a fine-tuning row, at most.
        max_answer_tokens: tokens of a fine-tuning row's prompt, and of its answer, at most.
        on_long_row: "truncate" or "skip" rows beyond these two limits; both are counted and logged.
        window_steps: optimiser steps whose samples are sorted by length and shuffled together.
        cache_folder: folder of tokenised rows; null for the default of `datasets`.
        workers: 1 reads and packs in a second process.
    """

    train: Sources
    eval: Sources | None = None
    on_bad_row: Literal["skip", "stop"] = "skip"
    tokens_per_step: int = Field(default=65_536, ge=1)
    micro_batch_tokens: int = Field(default=8_192, ge=1)
    spans: tuple[int, int] | None = Field(default=None, strict=False)
    excerpts_per_document: Literal["all", "one"] = "all"
    max_target_tokens: int | None = Field(default=None, ge=1)
    lm_token: bool = False
    max_context_tokens: int = Field(default=2_048, ge=1)
    max_answer_tokens: int = Field(default=512, ge=1)
    on_long_row: Literal["truncate", "skip"] = "truncate"
    window_steps: int = Field(default=16, ge=1)
    cache_folder: str | None = None
    workers: Literal[0, 1] = 0


class EvaluationSection(Section):
    """Measurements on the rows of `data.eval`.

    Args:
        samples: held-out samples, the first ones of `data.eval`, the same at every evaluation.
        restore_tokens: length of the held-out passage that is restored from its slots; 0 for none.
    """

    samples: int = Field(default=64, ge=1)
    restore_tokens: int = Field(default=256, ge=0)


def _section_of(kind: type, name: str, without: Iterable[str] = ()) -> type[Section]:
    """Return a section with the fields and the docstring of a dataclass."""
    hints = get_type_hints(kind)
    chosen = [f for f in dataclasses.fields(kind) if f.name not in without]

    def field(f: dataclasses.Field) -> Any:  # YAML has lists where the dataclass has tuples
        return Field(f.default, strict=False) if get_origin(hints[f.name]) is tuple else f.default

    fields: dict[str, Any] = {f.name: (hints[f.name], field(f)) for f in chosen}
    made = create_model(name, __base__=Section, **fields)
    made.__doc__ = kind.__doc__
    return made


if TYPE_CHECKING:  # a type checker cannot use classes that are made at run time

    class AdapterSection(Section): ...

    class DistillationSection(Section): ...

    class MemorySection(Section): ...

else:
    AdapterSection = _section_of(ICAEConfig, "AdapterSection", without=("base_model", "base_revision"))
    DistillationSection = _section_of(Distillation, "DistillationSection")
    MemorySection = _section_of(ActivationBudget, "MemorySection")


class Settings(Section):
    """All settings of a run.

    Args:
        output: folder of checkpoints, logs and, at the end, `adapter/`.
        model: the base model, and the adapter to start from.
        adapter: sizes and conventions of a new adapter.
        data: the rows that are read, and how they are packed into optimiser steps.
        stages: stages of the run, one after the other; at least one.
        distillation: distillation from the base model that reads the whole context.
        memory: memory for activations.
        evaluation: measurements on held-out rows.
        train: optimiser, schedule, checkpoints and logs.
    """

    output: str
    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    stages: list[dict[str, Any]] = []
    distillation: DistillationSection = DistillationSection()
    memory: MemorySection = MemorySection()
    evaluation: EvaluationSection = EvaluationSection()
    train: TrainSection = TrainSection()

    def icae_config(self) -> ICAEConfig:
        """Return the config of a new adapter.

        Raises:
            ConfigError: a field is out of range.
        """
        named: dict[str, Any] = {"base_model": self.model.name, "base_revision": self.model.revision}
        return ICAEConfig(**dict(self.adapter), **named)

    def curriculum(self) -> Curriculum:
        """Return the stages.

        Raises:
            ConfigError: there is no stage, or one is invalid.
        """
        return Curriculum.from_dicts(self.stages)

    @property
    def max_steps(self) -> int:
        """Optimiser steps of the run: `train.max_steps`, or those of all stages."""
        return int(self.train.given().get("max_steps", self.curriculum().total_steps))

    @property
    def trains_encoder(self) -> bool:
        """Whether the run ends with an encoder that was trained, in it or in the adapter that it continues from."""
        return self.model.adapter is not None or self.max_steps > self.curriculum().first_encoder_step()

    def budget(self) -> ActivationBudget:
        """Return the memory budget for activations.

        Raises:
            ConfigError: a field is out of range.
        """
        return ActivationBudget(**dict(self.memory))

    def distill(self) -> Distillation:
        """Return the distillation settings.

        Raises:
            ConfigError: a field is out of range.
        """
        return Distillation(**dict(self.distillation))

    def training_arguments(self, **more: Any) -> TrainingArguments:
        """Return transformers' `TrainingArguments` of the run.

        Args:
            more: further fields, which override the section `train`.

        Raises:
            ConfigError: transformers rejects a value.
        """
        derived = {"dataloader_num_workers": self.data.workers} | self._evaluation_schedule()
        return self.train.arguments(self.output, self.curriculum().total_steps, **derived, **more)

    def _evaluation_schedule(self) -> dict[str, Any]:
        """Return when to evaluate, where `data.eval` is given and `train.eval_strategy` is not.

        A run evaluates as often as it saves, and at its end if it is shorter than that. transformers' own default is
        not to evaluate, which would leave `data.eval` without effect.
        """
        given = self.train.given()
        if self.data.eval is None or "eval_strategy" in given:
            return {}
        steps = given.get("save_steps", DEFAULTS["save_steps"].value)
        # With `load_best_model_at_end` transformers requires that every saved step was evaluated.
        if steps >= 1 and not given.get("load_best_model_at_end"):
            steps = min(steps, self.max_steps)
        return {"eval_strategy": "steps", "eval_steps": given.get("eval_steps", steps)}

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, including defaults, as YAML values."""
        return self.model_dump(mode="json") | {"train": self.train.given()}

    def to_yaml(self) -> str:
        """Return the same as text that `icae_fast.training.loop.settings_file.load_settings` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, folder: str | Path) -> None:
        """Write `settings.yaml` into a folder atomically.

        Raises:
            OSError: it cannot be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically({Path(folder) / SETTINGS_FILE: self.to_yaml().encode()})
