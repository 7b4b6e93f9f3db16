"""Finds adapters and base models by name: folders, the hub, and the embedded model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from icae_fast.config import ICAEConfig
from icae_fast.errors import CheckpointError, InvalidInputError
from icae_fast.io.bundled import EMBEDDED_NAME, load_smollm2, load_smollm2_tokenizer
from icae_fast.io.checkpoints import CONFIG_FILE, TENSORS_FILE, read_header, save_adapter

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore


ADAPTERS = Path(__file__).parent / "adapters"

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a command line's `--dtype`.

    Raises:
        InvalidInputError: neither bfloat16 nor float32.
    """
    if name not in _DTYPES:
        raise InvalidInputError(f"--dtype is {name!r}; give bfloat16 or float32")
    return _DTYPES[name]


def shipped_adapters() -> dict[str, Path]:
    """The adapters that come with the package: name to folder."""
    return {path.parent.name: path.parent for path in sorted(ADAPTERS.glob(f"*/{TENSORS_FILE}"))}


def default_adapter(model: str) -> tuple[str, ICAEConfig] | None:
    """The adapter of the package for a base model, and its config; None where none comes with it."""
    for name, folder in shipped_adapters().items():
        config = read_header(folder)[0]
        if config.base_model == model:
            return name, config
    return None


def resolve_adapter_folder(path: str | Path, revision: str | None = None) -> Path:
    """A local folder with the adapter: the path itself, a shipped adapter's, or a snapshot of a hub repository.

    Raises:
        CheckpointError: neither a folder, nor the name of a shipped adapter, nor a repository that can be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    shipped = shipped_adapters()
    if str(path) in shipped:
        return shipped[str(path)]
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=[CONFIG_FILE, TENSORS_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{path} is neither a folder with an adapter, nor one that comes with this package "
            f"({', '.join(shipped) or 'none do'}), nor a hub repository that can be reached ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error's text: the hub's run over many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_base_model(
    base_model: nn.Module | str | Path | None, config: ICAEConfig, dtype: torch.dtype, tokenizer: Any = None
) -> tuple[nn.Module, Any]:
    """The base model and its tokenizer: as given, by name, or as the adapter's config names it.

    A tokenizer that is given is taken, and none is looked for.

    Returns:
        (model, tokenizer); the tokenizer is None where none is found beside a model given as an object.

    Raises:
        CheckpointError: there is no name to go by, or nothing can be loaded from it.
    """
    if isinstance(base_model, nn.Module):
        return base_model, tokenizer or load_tokenizer(base_model.config._name_or_path, required=False)
    name = str(base_model or config.base_model or "")
    revision = None if base_model else config.base_revision  # the adapter's revision is not that of another base
    if not name:
        raise CheckpointError("the adapter does not name its base model; pass base_model=")
    if name == EMBEDDED_NAME:
        model, own = load_smollm2(dtype)
        return model, tokenizer or own
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=revision or "main")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the base model {name} cannot be loaded ({_reason(error)}); pass base_model=") from error
    return model.eval(), tokenizer or load_tokenizer(name, required=True, revision=revision)


def load_tokenizer(name: str, *, required: bool, revision: str | None = None) -> Any:
    """The tokenizer of a folder, a hub repository or the embedded model; None, unless it is required, if there is none.

    Raises:
        CheckpointError: it is required and cannot be loaded.
    """
    from transformers import AutoTokenizer

    if name == EMBEDDED_NAME:
        return load_smollm2_tokenizer()
    if not required and not Path(name).is_dir():
        return None
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        if not required:
            return None
        raise CheckpointError(
            f"the tokenizer of {name} cannot be loaded ({_reason(error)}); pass tokenizer="
        ) from error


def upload_adapter(core: ICAECore, name: str, **kwargs: Any) -> str:
    """Create the hub repository if need be and upload the adapter's two files; gives the repository's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(core, folder)
        url = api.create_repo(name, exist_ok=True, **kwargs)
        api.upload_folder(repo_id=name, folder_path=folder)
    return str(url)
