"""Read the reference's checkpoint files: v2 `.safetensors`, v1 `.pt`, and both in shards with an index."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from icae_fast.errors import CheckpointError
from icae_fast.io.files import expanded, load_tensors, parse_json
from icae_fast.io.packages import first_line

# File names that transformers' Trainer gives to a model, the preferred one first.
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_ZIP = b"PK\x03\x04"


def find_reference_file(path: str | Path) -> Path:
    """Return the file that a path means: the file itself, the index of its shards, or the model in a folder.

    Raises:
        CheckpointError: there is no such file.
    """
    path = expanded(path)
    candidates = [path, path.with_name(path.name + _INDEX)] if path.name else []
    if os.path.isdir(path):
        candidates = [path / (name + suffix) for name in _MODEL_FILES for suffix in ("", _INDEX)]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    if os.path.isdir(path):
        raise CheckpointError(f"{path} holds none of {', '.join(p.name for p in candidates)}; pass the file's path")
    raise CheckpointError(f"there is no file {path}; check the path")


def is_safetensors(path: Path) -> bool:
    """Return whether a file from `find_reference_file` is safetensors, or the index of such shards."""
    return path.name.removesuffix(_INDEX).endswith(".safetensors")


def read_reference_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a reference checkpoint: `.safetensors`, or `.pt` and `.bin` read with `weights_only=True`.

    Args:
        path: a file, an index of shards or the name that it indexes, or a folder with one of these.

    Raises:
        CheckpointError: a file is missing or truncated, or contains more than tensors.
    """
    found = find_reference_file(path)
    if not found.name.endswith(_INDEX):
        return _read_file(found)
    tensors: dict[str, torch.Tensor] = {}
    for name, keys in _shards(found).items():
        shard = _read_file(found.parent / name)
        if lacking := sorted(keys - shard.keys()):
            raise CheckpointError(
                f"{found.parent / name} lacks {lacking[0]}, which {found.name} lists; download it again"
            )
        tensors |= shard
    return tensors


def _shards(path: Path) -> dict[str, set[str]]:
    """Return the keys of each shard that an index lists."""
    try:
        files = parse_json(path.read_bytes())["weight_map"]
        if not isinstance(files, dict) or not files:
            raise ValueError("weight_map lists no files")
        shards: dict[str, set[str]] = {}
        for key, name in files.items():
            # A name with a folder would lead outside of the checkpoint.
            if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.(safetensors|bin|pt)", name):
                raise ValueError(f"{name!r:.80} is no name of a shard")
            shards.setdefault(name, set()).add(key)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}); download it again") from error
    return shards


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    if path.name.endswith(".safetensors"):
        return load_tensors(path)[0]
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}; check the path")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TypedStorage, or pickles of another protocol
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything: IndexError, KeyError, struct.error
        raise CheckpointError(
            f"{path} is truncated, or holds more than tensors ({first_line(error)}); download it again"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} is no dictionary of tensors; pass the checkpoint's state dict")
    named = {str(key): tensor for key, tensor in tensors.items()}
    for key, tensor in named.items():
        if not _is_held(tensor):
            raise CheckpointError(f"{path}: {key} has more elements than the file holds; download it again")
    return named


def _check_archive(path: Path) -> None:
    """Raise unless a zip archive's records are as long as they say, so that none grows when it is read."""
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    with zipfile.ZipFile(path) as archive:
        size = sum(record.file_size for record in archive.infolist())
    if size > os.path.getsize(path):
        raise ValueError(f"its records have {size} bytes, more than the file")


def _is_held(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is dense and each of its elements has its own place in memory."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
