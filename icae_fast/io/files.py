"""Atomic file writes, memory-mapped reads, and safetensors files."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from icae_fast.errors import CheckpointError


def write_atomically(files: Mapping[Path, bytes | bytearray]) -> None:
    """Write files under temporary names beside their targets, sync them, and rename all when all are written.

    On return the contents are on disk, but the names may not be; see `sync_folder`.

    Raises:
        OSError: a folder cannot be written or is full; no temporary file remains and older files are unchanged.
    """
    temporaries = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}") for path in files}
    try:
        for path, data in files.items():
            with open(temporaries[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; a no-op on Windows, which has no such call and does this itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def map_file(path: str | Path) -> torch.Tensor:
    """Map a file into memory and return its bytes as a (size,) uint8 tensor, without reading it.

    The mapping is private: writes to the tensor stay in this process. No file descriptor is kept, so any number of
    files can be mapped. A mapped file must not be truncated; replacing or deleting it is safe.

    Raises:
        OSError: the file cannot be opened.
    """
    size = os.stat(path).st_size
    if size == 0:  # an empty file cannot be mapped
        return torch.empty(0, dtype=torch.uint8)
    try:
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        if not os.path.exists(path):  # deleted after os.stat
            raise FileNotFoundError(f"{path} was deleted") from error
        raise OSError(str(error).splitlines()[0]) from error


def tensor_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file."""
    return save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, dict(metadata))


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically."""
    write_atomically({Path(path): tensor_bytes(tensors, metadata)})


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
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
