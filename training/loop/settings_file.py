"""Reading a settings file, checked before anything is loaded.

Everything that is wrong in a file is one `ConfigError` that names the keys.
"""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from icae_fast.errors import ConfigError
from icae_fast.training.data.sources import SourceSpec
from icae_fast.training.data.yaml_file import parse_yaml
from icae_fast.training.loop.arguments import TrainSection
from icae_fast.training.loop.settings import DataSection, Settings
from icae_fast.training.loop.sharding import check_launch

log = logging.getLogger(__name__)

_DEEPEST = 16  # sections above a key of --set
# Keys of earlier versions: (section, old name) to the present name.
_RENAMED = {("data", "windows_per_document"): "excerpts_per_document"}


def installed_configs() -> dict[str, Path]:
    """Return the configs of `training/configs`, keyed by file name without extension."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))}


def load_settings(
    path: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Settings:
    """Read and check a settings file.

    Args:
        path: the YAML file.
        overrides: texts `section.key=value`, the value in YAML; they override the file.
        defaults: nested values that the file overrides, default none.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the closest known key is named), a value has the wrong
            type or is out of range, or two settings contradict each other. All of these are listed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings {path}: {error}") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        sections = ", ".join(Settings.model_fields)
        raise ConfigError(f"{path} holds {type(values).__name__}; it must hold the sections {sections}")
    values = _merged(dict(defaults or {}), values)
    for setting in overrides:
        _override(values, setting)
    where = " ".join([str(path), *(f"--set {setting}" for setting in overrides)])
    _rename_keys(values)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_sentence(e) for e in error.errors())) from error
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{path} or --set: {error.object!r} holds half a surrogate pair; write it in UTF-8"
        ) from error
    try:
        _check(settings, values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return settings


def _merged(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Return `low` updated recursively by `high`."""
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(low.get(key), dict)
        low[key] = _merged(dict(low[key]), value) if both else value
    return low


def _override(values: dict[str, Any], text: str) -> None:
    """Set `section.key=value` in nested values; list items are named by their index."""
    name, equals, value = text.partition("=")
    *path, last = name.strip().split(".")
    if len(path) > _DEEPEST:
        raise ConfigError(
            f"--set {text[:80]!r}... names a key of more than {_DEEPEST} sections; give section.key=value"
        )
    if not equals or not last:
        raise ConfigError(f"--set {text!r} is not a setting; give section.key=value, such as train.max_steps=100")
    place: Any = values
    for part in path:
        if (item := _item(place, part)) is not None:
            place = place[item]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise ConfigError(f"--set {text!r}: there is no key {part}")
    key = _item(place, last)
    if key is None and not isinstance(place, dict):
        raise ConfigError(f"--set {text!r}: {'.'.join(path)} has no keys")
    place[last if key is None else key] = parse_yaml(value, f"--set {name.strip()}: the value")


def _item(place: Any, part: str) -> int | None:
    """Return the index in a list that a part of a key names, None if it names none."""
    if not isinstance(place, list) or not part.isdecimal() or len(part) > 9:
        return None
    return int(part) if int(part) < len(place) else None


def _rename_keys(values: dict[str, Any]) -> None:
    """Replace the names that keys had in earlier versions, with a warning.

    Raises:
        ConfigError: a key is given under both names.
    """
    for (section, old), new in _RENAMED.items():
        keys = values.get(section)
        if not isinstance(keys, dict) or old not in keys:
            continue
        if new in keys:
            raise ConfigError(f"{section}.{old} is the old name of {section}.{new}; give only the latter")
        log.warning("%s.%s is now called %s.%s; the old name still works", section, old, section, new)
        values[section] = {new if key == old else key: value for key, value in keys.items()}


def _sentence(error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as a sentence."""
    *above, last = error["loc"] or ("",)
    path = [str(part) for part in above if isinstance(part, int) or "[" not in part]  # pydantic names types, too
    if error["type"] == "extra_forbidden" or not isinstance(last, str) or "[" not in last:
        path.append(str(last))
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown key {name}; {hint}known are {', '.join(sorted(known))}"
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{name} is {reprlib.repr(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _known_keys(path: Sequence[str]) -> list[str]:
    """Return the keys of the section at a path."""
    section: type[BaseModel] = Settings
    for part in path:
        field = section.model_fields.get(part)
        kind = None if field is None else field.annotation
        if not isinstance(kind, type) or not issubclass(kind, BaseModel):
            return []
        section = kind
    return section.known() if issubclass(section, TrainSection) else list(section.model_fields)


def _check(settings: Settings, values: Mapping[str, Any]) -> None:
    """Raise if settings contradict each other or the launch of the process."""
    model, data = settings.model, settings.data
    if model.adapter is not None and "adapter" in values:
        raise ConfigError(
            "model.adapter and the section adapter are both given, but a saved adapter has a config; leave one of the "
            "two out"
        )
    config = settings.icae_config()
    settings.budget()
    distillation, curriculum = settings.distill(), settings.curriculum()
    if distillation.alpha and not any(
        set(distillation.objectives) & set(stage.objectives) for stage in curriculum.stages
    ):
        log.warning(
            "distillation.alpha is %s, but no stage has %s, so no sample has a teacher; add one to the stages, or to "
            "distillation.objectives", distillation.alpha, " or ".join(distillation.objectives),
        )  # fmt: skip
    if model.adapter is None:
        curriculum.check(config)
    _check_data(data)
    train = settings.train.given()
    if data.eval is None and train.get("eval_strategy", "no") != "no":
        raise ConfigError("train.eval_strategy requires evaluation, but data.eval names no held-out rows")
    if data.eval is None and train.get("load_best_model_at_end"):
        raise ConfigError("train.load_best_model_at_end requires evaluation; name held-out rows in data.eval")
    if train.get("eval_strategy") == "no" and train.get("load_best_model_at_end"):
        raise ConfigError(
            "train.load_best_model_at_end requires evaluation, which train.eval_strategy=no turns off; set "
            "train.load_best_model_at_end=false as well"
        )
    check_launch()
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in ("no", ""):
        raise ConfigError(
            "accelerate is launched with mixed precision, but model.dtype is the dtype of the computation, and "
            "adapters are always trained in fp32; launch with --mixed_precision no"
        )


def _check_data(data: DataSection) -> None:
    """Raise if settings of the section `data` contradict each other."""
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


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of nested keys whose values differ."""
    changed = []
    for key in sorted({*old, *new}, key=str):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key}")
    return changed
