"""Chat models from command-line options: an endpoint with its key and request fields, or a local model."""

from __future__ import annotations

import json
import os
from typing import Any

from icae_fast.errors import InvalidInputError
from icae_fast.io.bundled import BUNDLED_NAME
from icae_fast.io.console import KEY_ENV
from icae_fast.training.chat.local import LocalModel


def check_names(role: str, prefix: str, endpoint: str | None, model: str | None, local: str | None) -> None:
    """Raise unless the options name at most one chat model: an endpoint and a model name, or a local model.

    Args:
        role: use of the model for error messages, e.g. "teacher".
        prefix: prefix of the options for error messages, e.g. "--judge-".
        endpoint, model, local: the options' values.

    Raises:
        InvalidInputError: the options contradict each other or are incomplete.
    """
    if endpoint is not None and local is not None:
        raise InvalidInputError(f"{prefix}endpoint and {prefix}local are two {role}s; give one of them")
    if endpoint is not None and model is None:
        raise InvalidInputError(f"{prefix}endpoint needs {prefix}model, the model's name at the endpoint")
    if endpoint is None and model is not None:
        raise InvalidInputError(
            f"{prefix}model is a name at an endpoint; give {prefix}endpoint as well, or {prefix}local instead"
        )


def api_key(variable: str) -> str | None:
    """Return the key in an environment variable, or None if the default variable is not set.

    Raises:
        InvalidInputError: a variable other than the default is not set.
    """
    key = os.environ.get(variable)
    if key is None and variable != KEY_ENV:  # a local server needs no key, but a variable given by name must exist
        raise InvalidInputError(f"the environment variable {variable} of the API key is not set; export it")
    return key


def request_fields(option: str, text: str | None, temperature: float | None) -> dict[str, Any]:
    """Return the extra fields of each request.

    Args:
        option: name of the option for error messages.
        text: a JSON object, or None.
        temperature: default of the field `temperature`; None leaves it to the endpoint.

    Raises:
        InvalidInputError: the text is not a JSON object.
    """
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidInputError(f"{option} is not JSON ({error}); give an object, e.g. '{{\"seed\": 1}}'") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{option} is {text}, not a JSON object; give one, e.g. '{{\"seed\": 1}}'")
    return ({} if temperature is None else {"temperature": temperature}) | fields


def model_name(name: str) -> str:
    """Return the name that loads a model; `smollm2` means the bundled one, and `~` the home folder."""
    return BUNDLED_NAME if name == "smollm2" else os.path.expanduser(name)


def load_local(name: str, dtype: str, **options: Any) -> LocalModel:
    """Load a local model, onto the GPU if there is one.

    Args:
        name: a folder, a hub id, or smollm2.
        dtype: bfloat16 or float32.
        options: keyword arguments of `LocalModel`.

    Raises:
        InvalidInputError: the dtype is unknown.
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
