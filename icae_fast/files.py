"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from icae_fast.errors import CheckpointError


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, sync it, and rename it into place.

    Raises:
        OSError: the folder cannot be written or is full; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    contiguous = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    write_atomically(path, save(contiguous, dict(metadata)))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: there is no such file, or it is truncated or no safetensors file.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}; check the path")
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); download or save it again"
        ) from error
