"""Chat models as commands name them: an endpoint with its key and request fields, or a local model."""

from __future__ import annotations

import json
import os
from typing import Any

from icae_fast.errors import InvalidInputError
from icae_fast.io.bundled import BUNDLED_NAME
from icae_fast.io.console import KEY_ENV
from icae_fast.training.chat.local import LocalModel


def check_names(role: str, prefix: str, endpoint: str | None, model: str | None, local: str | None) -> None:
    """That options name one chat model, or none: an endpoint with the model's name there, or a local model.

    Args:
        role: what the model is used as, such as "teacher"; in errors.
        prefix: of the options `endpoint`, `model` and `local`, such as "--judge-"; in errors.
        endpoint, model, local: the options' values.

    Raises:
        InvalidInputError: options that do not go together.
    """
    if endpoint is not None and local is not None:
        raise InvalidInputError(f"{prefix}endpoint and {prefix}local are two {role}s; give one of them")
    if endpoint is not None and model is None:
        raise InvalidInputError(f"{prefix}endpoint needs {prefix}model, the model's name there")
    if endpoint is None and model is not None:
        raise InvalidInputError(
            f"{prefix}model is a name at an endpoint; give {prefix}endpoint, too, or {prefix}local in its place"
        )


def api_key(variable: str) -> str | None:
    """The key in an environment variable; None where the usual one is not set.

    Raises:
        InvalidInputError: another variable is not set.
    """
    key = os.environ.get(variable)
    if key is None and variable != KEY_ENV:  # a local server needs none, but who names a variable means it
        raise InvalidInputError(f"the environment variable {variable} of the API key is not set; export it")
    return key


def request_fields(option: str, text: str | None, temperature: float | None) -> dict[str, Any]:
    """Further fields of each request.

    Args:
        option: named in errors.
        text: a JSON object, or None.
        temperature: a field, too, unless the object has it; None for the endpoint's own.

    Raises:
        InvalidInputError: the text is no JSON object.
    """
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidInputError(f"{option} is not JSON ({error}); give an object such as '{{\"seed\": 1}}'") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{option} is {text}, not a JSON object; give one such as '{{\"seed\": 1}}'")
    return ({} if temperature is None else {"temperature": temperature}) | fields


def model_name(name: str) -> str:
    """The name that loads a model: `smollm2` stands for the embedded one."""
    return BUNDLED_NAME if name == "smollm2" else name


def load_local(name: str, dtype: str, **options: Any) -> LocalModel:
    """A local model, on the GPU where there is one.

    Args:
        name: a folder, a hub id, or smollm2.
        dtype: bfloat16 or float32.
        options: of `LocalModel`.

    Raises:
        InvalidInputError: another dtype.
        CheckpointError: the model cannot be loaded.
        TokenizerMismatchError: see `LocalModel`.
    """
    import torch
    from transformers.utils import logging

    from icae_fast import ICAEConfig
    from icae_fast.io.hub import load_base_model, parse_dtype

    torch_dtype = parse_dtype(dtype)
    logging.disable_progress_bar()
    model, tokenizer = load_base_model(model_name(name), ICAEConfig(), torch_dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LocalModel(model.to(device), tokenizer, model_name(name), **options)
