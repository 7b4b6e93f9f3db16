"""Resolve adapters, base models and tokenizers by name: a folder, a hub repository, or what the package ships."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from icae_fast.config import ICAEConfig
from icae_fast.errors import CheckpointError, ICAEError, InvalidInputError, MissingPackageError
from icae_fast.io.bundled import BUNDLED_NAME, load_smollm2, load_smollm2_tokenizer
from icae_fast.io.checkpoints import CONFIG_FILE, TENSORS_FILE, read_header, save_adapter
from icae_fast.io.files import expanded
from icae_fast.io.packages import first_line
from icae_fast.io.peft_folder import PEFT_CONFIG_FILE, PEFT_TENSORS_FILE

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore

ADAPTERS = Path(__file__).parents[1] / "adapters"

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer", "tekken", "vocab", "merges", "spiece", "sentencepiece")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype that the option `--dtype` names.

    Raises:
        InvalidInputError: the name is neither bfloat16 nor float32.
    """
    if name not in _DTYPES:
        raise InvalidInputError(f"--dtype is {name!r}; give bfloat16 or float32")
    return _DTYPES[name]


def shipped_adapters() -> dict[str, Path]:
    """Return the adapters that ship with the package, name to folder."""
    return {path.parent.name: path.parent for path in sorted(ADAPTERS.glob(f"*/{TENSORS_FILE}"))}


def default_adapter(model: str) -> tuple[str, ICAEConfig] | None:
    """Return (name, config) of the shipped adapter for a base model, or None if there is none."""
    for name, folder in shipped_adapters().items():
        config = read_header(folder)[0]
        if config.base_model == model:
            return name, config
    return None


def resolve_adapter_folder(path: str | Path, revision: str | None = None) -> Path:
    """Return a local folder with the adapter: the path itself, a shipped adapter's, or a snapshot from the hub.

    Args:
        path: a folder, the name of a shipped adapter, or a hub repository.
        revision: of the hub repository; None for its main branch.

    Raises:
        CheckpointError: the path is none of these, or the repository cannot be reached.
    """
    folder = expanded(path)
    if os.path.isdir(folder):
        return folder
    shipped = shipped_adapters()
    if str(path) in shipped:
        return shipped[str(path)]
    from huggingface_hub import snapshot_download

    try:
        files = [CONFIG_FILE, TENSORS_FILE, PEFT_CONFIG_FILE, PEFT_TENSORS_FILE]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=files))
    except Exception as error:  # its own errors, and those of its HTTP client
        raise CheckpointError(
            f"{path} is neither a folder with an adapter, nor one that ships with this package "
            f"({', '.join(shipped) or 'none does'}), nor a hub repository that can be reached ({first_line(error)})"
        ) from error


def load_base_model(
    base_model: nn.Module | str | Path | None, config: ICAEConfig, dtype: torch.dtype, tokenizer: Any = None
) -> tuple[nn.Module, Any]:
    """Return the base model and its tokenizer.

    Args:
        base_model: the model itself, or its name or path; None for the base model that the config names.
        config: the adapter's config.
        dtype: dtype of a model that is loaded here.
        tokenizer: used as is; None to load the tokenizer that belongs to the base model.

    Returns:
        (model, tokenizer). The tokenizer is None if `base_model` is a model object and none is found for it.

    Raises:
        CheckpointError: the base model has no name, or cannot be loaded from it, or its weights do not fit its config.
        MissingPackageError: the base model or its tokenizer needs a package that is not installed.
    """
    if isinstance(base_model, nn.Module):
        own_config: Any = base_model.config
        return base_model, tokenizer or load_tokenizer(own_config._name_or_path, required=False)
    name = os.path.expanduser(base_model or config.base_model or "")
    revision = None if base_model else config.base_revision  # base_revision belongs to the base model of the config
    if not name:
        raise CheckpointError("the adapter does not name its base model; pass base_model=")
    if name == BUNDLED_NAME:
        model, own = load_smollm2(dtype)
        return model, tokenizer or own
    model = _load_model(name, dtype, revision)
    return model, tokenizer or load_tokenizer(name, required=True, revision=revision)


def _load_model(name: str, dtype: torch.dtype, revision: str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with _loading(f"the base model {name}", "base_model="):
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # annotated as a model, and with this option a pair
            name, dtype=dtype, revision=revision or "main", output_loading_info=True
        )
    model, info = loaded
    _check_complete(name, info)
    evaluating: nn.Module = model.eval()
    return evaluating


@contextlib.contextmanager
def _loading(what: str, argument: str) -> Iterator[None]:
    """Turn any error of transformers in the block into one of this package.

    transformers, tokenizers and what they call raise about any class for a damaged file, plain `Exception` too.
    """
    try:
        yield
    except (ICAEError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs a package that is not installed ({first_line(error)}); install it, or pass another "
            f"{argument} (an unquantised one, if this one is quantised)"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{what} cannot be loaded ({first_line(error)}); pass {argument}") from error


def _check_complete(name: str, info: Mapping[str, Any]) -> None:
    """Raise unless the files of a model have just the weights that its config asks for.

    transformers fills missing weights with random values, and leaves out those of layers beyond the config's number.
    """
    missing = sorted(info["missing_keys"])
    # Old checkpoints hold the rotary frequencies, which are computed.
    left = sorted(k for k in info["unexpected_keys"] if re.search(r"\blayers\.\d", k) and "rotary_emb" not in k)
    parts = [f"the weights lack {_few(missing)}"] * bool(missing) + [f"the config has no {_few(left)}"] * bool(left)
    if parts:
        raise CheckpointError(
            f"the weights of the base model {name} do not fit its config.json: {', and '.join(parts)}; correct the "
            "config, or download the model again"
        )


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def load_tokenizer(name: str, *, required: bool, revision: str | None = None) -> Any:
    """Return the tokenizer of a folder, a hub repository or the bundled model.

    Args:
        name: folder, hub repository, or `BUNDLED_NAME`.
        required: raise if it cannot be loaded; otherwise return None, and look in local folders only.
        revision: of the hub repository; None for its main branch.

    Raises:
        CheckpointError: it is required and cannot be loaded.
        MissingPackageError: it is required and needs a package that is not installed.
    """
    from transformers import AutoTokenizer

    if name == BUNDLED_NAME:
        return load_smollm2_tokenizer()
    name = os.path.expanduser(name)
    if not required and not os.path.isdir(name):
        return None
    try:
        with _loading(f"the tokenizer of {name}", "tokenizer="):
            return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (CheckpointError, MissingPackageError) as error:
        if required:
            raise
        if any(file.startswith(_TOKENIZER_FILES) for file in os.listdir(name)):
            log.warning("%s", error)
        return None


def upload_adapter(core: ICAECore, name: str, **kwargs: Any) -> str:
    """Upload the adapter's two files to a hub repository, created if necessary, and return its address.

    Args:
        core: the model.
        name: "user/repository".
        kwargs: options of `huggingface_hub.HfApi.create_repo` (`private`, `token`).
    """
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(core, folder)
        url = api.create_repo(name, exist_ok=True, **kwargs)
        api.upload_folder(repo_id=name, folder_path=folder)
    return str(url)
