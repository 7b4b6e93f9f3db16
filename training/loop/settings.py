"""Settings of a training run: one YAML file, checked before anything is loaded.

Sections are `model`, `adapter`, `data`, `stages`, `distillation`, `memory`, `evaluation` and `train`; the classes
below say what each holds. Whatever is wrong in a file is one `ConfigError` that names the keys.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from icae_fast import ICAEConfig
from icae_fast.errors import ConfigError
from icae_fast.io.bundled import BUNDLED_NAME
from icae_fast.io.files import write_atomically
from icae_fast.step.budget import ActivationBudget
from icae_fast.training.data.sources import SourceSpec
from icae_fast.training.loop.arguments import TrainSection
from icae_fast.training.loop.sharding import check_launch
from icae_fast.training.methods.curriculum import Curriculum
from icae_fast.training.methods.distill import Distillation

SETTINGS_FILE = "settings.yaml"


Sources = str | dict[str, Any] | list[str | dict[str, Any]]


class Section(BaseModel):
    """Base of all sections: values are frozen and of the declared type, and no key is unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=False)


class ModelSection(Section):
    """The base model, and the adapter to start from.

    Args:
        name: of the base model: a path, a hub id, or the embedded SmolLM2.
        revision: of the base model on the hub.
        dtype: of the base model and of what is computed; adapters are trained in fp32.
        adapter: a folder or hub id of a saved adapter to go on from, whose config holds; None for a new one.
        max_positions: the most positions that the decoder may use; None for the base model's own limit. More than
            that trains it where it has to extrapolate.
    """

    name: str = BUNDLED_NAME
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    adapter: str | None = None
    max_positions: int | None = Field(None, ge=1)


class DataSection(Section):
    """What is read, and how it becomes optimiser steps.

    Args:
        train: sources of training rows, one or a list: a path, or the fields of
        `icae_fast.training.data.sources.SourceSpec`.
        eval: sources of held-out rows; none for no evaluation.
        on_bad_row: "skip" logs and counts a row that cannot be used, "stop" ends the run there.
        tokens_per_step: tokens, of contexts and of what the decoder reads, of an optimiser step over all processes.
        micro_batch_tokens: tokens of one forward and backward.
        spans: [low, high]; the number of spans of a pretraining window is drawn from them, up to the stage's
            `max_tokens`. None leaves its length to the stages alone.
        windows_per_document: "all" cuts a long document into windows, "one" takes one of it an epoch.
        max_target_tokens: the most tokens by which a window is continued; None for as many as it has itself.
        lm_token: put the LM token behind the slots where a text is continued.
        max_context_tokens: of a fine-tuning row.
        max_answer_tokens: of its prompt and of its answer.
        on_long_row: "truncate" or "skip" rows that pass these; both are counted and logged.
        window_steps: optimiser steps whose samples are sorted by length and shuffled together.
        cache_folder: where tokenised rows are kept; None for the default of `datasets`.
        workers: 1 reads and packs in a second process.
    """

    train: Sources
    eval: Sources | None = None
    on_bad_row: Literal["skip", "stop"] = "skip"
    tokens_per_step: int = Field(65_536, ge=1)
    micro_batch_tokens: int = Field(8_192, ge=1)
    spans: tuple[int, int] | None = Field(None, strict=False)
    windows_per_document: Literal["all", "one"] = "all"
    max_target_tokens: int | None = Field(None, ge=1)
    lm_token: bool = False
    max_context_tokens: int = Field(2_048, ge=1)
    max_answer_tokens: int = Field(512, ge=1)
    on_long_row: Literal["truncate", "skip"] = "truncate"
    window_steps: int = Field(16, ge=1)
    cache_folder: str | None = None
    workers: Literal[0, 1] = 0


class EvaluationSection(Section):
    """What is measured on held-out rows, at every `train.eval_steps`.

    Args:
        samples: the first so many samples that `data.eval` gives, the same each time.
        restore_tokens: length of the held-out passage that is restored without help; 0 for none.
    """

    samples: int = Field(64, ge=1)
    restore_tokens: int = Field(256, ge=0)


def _section_of(kind: type, name: str, without: Iterable[str] = ()) -> type[Section]:
    """A section with the fields of a dataclass."""
    hints = get_type_hints(kind)
    chosen = [f for f in dataclasses.fields(kind) if f.name not in without]

    def field(f: dataclasses.Field) -> Any:  # a list in YAML may be a tuple
        return Field(f.default, strict=False) if get_origin(hints[f.name]) is tuple else f.default

    return create_model(name, __base__=Section, **{f.name: (hints[f.name], field(f)) for f in chosen})


AdapterSection = _section_of(ICAEConfig, "AdapterSection", without=("base_model", "base_revision"))
DistillationSection = _section_of(Distillation, "DistillationSection")
MemorySection = _section_of(ActivationBudget, "MemorySection")


class Settings(Section):
    """All settings of a run.

    Args:
        output: folder of checkpoints, logs and, at the end, `adapter/`.
        model, data, distillation, memory, evaluation, train: see the sections.
        adapter: fields of `ICAEConfig`, for a new adapter.
        stages: fields of `icae_fast.training.methods.curriculum.Stage`, for each stage.
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
        """The config of a new adapter.

        Raises:
            ConfigError: a field is out of range.
        """
        named = {"base_model": self.model.name, "base_revision": self.model.revision}
        return ICAEConfig(**dict(self.adapter), **named)

    def curriculum(self) -> Curriculum:
        """The stages.

        Raises:
            ConfigError: there is none, or one is wrong.
        """
        return Curriculum.from_dicts(self.stages)

    def budget(self) -> ActivationBudget:
        """Memory for what a step's backward would otherwise compute again.

        Raises:
            ConfigError: a field is out of range.
        """
        return ActivationBudget(**dict(self.memory))

    def distill(self) -> Distillation:
        """Distillation from the model that reads the whole context.

        Raises:
            ConfigError: a field is out of range.
        """
        return Distillation(**dict(self.distillation))

    def to_dict(self) -> dict[str, Any]:
        """All settings, defaults included, as YAML values."""
        return self.model_dump(mode="json") | {"train": self.train.given()}

    def to_yaml(self) -> str:
        """The same as text that `load_settings` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, folder: str | Path) -> None:
        """Write `settings.yaml` into a folder, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically({Path(folder) / SETTINGS_FILE: self.to_yaml().encode()})


def load_settings(
    path: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Settings:
    """Read and check a settings file.

    Args:
        path: of the YAML file.
        overrides: `section.key=value` texts, the value in YAML, that win over the file.
        defaults: nested values that the file wins over.

    Returns:
        The settings.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the nearest known is named), a value has the wrong
            type or is out of range, or two settings contradict each other. All of them are listed.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; it must hold sections: {_listed(Settings)}")
    values = _merged(dict(defaults or {}), values)
    for text in overrides:
        _override(values, text)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_sentence(e) for e in error.errors())) from error
    try:
        _check(settings, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return settings


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes `1e-4` for text, having no dot; here it is a number, as in YAML 1.2."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _merged(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of `low` replaced by those of `high`."""
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(low.get(key), dict)
        low[key] = _merged(dict(low[key]), value) if both else value
    return low


def _override(values: dict[str, Any], text: str) -> None:
    """Put `section.key=value` into nested values; list items are named by their number."""
    name, equals, value = text.partition("=")
    *path, last = name.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"--set {text!r} is no setting; give section.key=value, such as train.max_steps=100")
    place: Any = values
    for part in [*path, last][:-1]:
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise ConfigError(f"--set {text!r}: there is nothing called {part} in it")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        last = int(last)
    elif not isinstance(place, dict):
        raise ConfigError(f"--set {text!r}: {'.'.join(path)} has no keys")
    try:
        place[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is no YAML ({error})") from error


def _sentence(error: Mapping[str, Any]) -> str:
    """What pydantic found, for a user."""
    path = [str(part) for part in error["loc"] if isinstance(part, int) or "[" not in part]
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _fields(Settings, path[:-1])
        near = get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown key {name}; {hint}known are {', '.join(sorted(known))}"
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{name} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fields(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Keys of the section at a path."""
    for part in path:
        kind = section.model_fields[part].annotation
        if not isinstance(kind, type) or not issubclass(kind, BaseModel):
            return []
        section = kind
    return section.known() if issubclass(section, TrainSection) else list(section.model_fields)


def _listed(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)


def _check(settings: Settings, values: Mapping[str, Any]) -> None:
    """Raise where values contradict each other."""
    model, data = settings.model, settings.data
    if model.adapter is not None and "adapter" in values:
        raise ConfigError(
            "model.adapter and the section adapter are both given, but a saved adapter brings its own config; leave "
            "one of them out"
        )
    config = settings.icae_config()
    settings.budget()
    settings.distill()
    curriculum = settings.curriculum()
    if model.adapter is None:
        curriculum.check(config)
    if data.micro_batch_tokens > data.tokens_per_step:
        raise ConfigError(
            f"data.micro_batch_tokens is {data.micro_batch_tokens}, more than data.tokens_per_step, "
            f"{data.tokens_per_step}; a step holds at least one micro-batch"
        )
    if data.spans is not None and not 1 <= data.spans[0] <= data.spans[1]:
        raise ConfigError(f"data.spans is {list(data.spans)}; give [low, high] with 1 <= low <= high")
    for name in ("train", "eval"):
        given = getattr(data, name)
        for spec in given if isinstance(given, list) else [given] if given is not None else []:
            try:
                SourceSpec.make(spec)
            except ConfigError as error:
                raise ConfigError(f"data.{name}: {error}") from error
    train = settings.train.given()
    if data.eval is None and train.get("eval_strategy", "no") != "no":
        raise ConfigError("train.eval_strategy asks for evaluation, but data.eval names no held-out rows")
    if data.eval is None and train.get("load_best_model_at_end"):
        raise ConfigError("train.load_best_model_at_end needs evaluation; name held-out rows in data.eval")
    check_launch()
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in ("no", ""):
        raise ConfigError(
            "accelerate is launched with mixed precision, but model.dtype is what everything is computed in and "
            "adapters are trained in fp32 anyway; launch with --mixed_precision no"
        )


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the nested keys whose values differ."""
    changed = []
    for key in sorted({*old, *new}, key=str):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key}")
    return changed
