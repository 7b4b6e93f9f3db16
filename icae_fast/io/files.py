"""Atomic file writes, memory-mapped reads, and safetensors files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save

from icae_fast.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and what killed writers left stays
    fcntl = None  # type: ignore[assignment]

_MAX_NAME = 255 - 34  # bytes of a file name that leave room for the dots and digits of a temporary one
_MAX_DEPTH = 64  # of nested JSON values; our own files need 4


def expanded(path: str | Path) -> Path:
    """Return a path with a leading `~` replaced by the home folder, as a shell does."""
    return Path(os.path.expanduser(path))


def write_atomically(files: Mapping[Path, bytes | bytearray], *, new_names: bool = False) -> None:
    """Write files under temporary names beside their targets, sync them, and rename all when all are written.

    The renames come in the order of `files`, and a kill may fall between two of them. So the first file must hold
    everything, and a reader must prefer it to the others; or no reader knows the names yet (`new_names`).

    On return the contents are on disk, but the names may not be; see `sync_folder`. Temporary files that killed writers
    of the same names left are deleted; those of writers at work are locked, and stay.

    Args:
        files: content of each file.
        new_names: nothing else has ever been written under these names, so that nothing is locked or looked for.

    Raises:
        OSError: a folder cannot be written or is full; no temporary file remains and older files are unchanged.
    """
    if not new_names:
        for folder in {path.parent for path in files}:
            _delete_abandoned(folder, {_stem(path.name) for path in files if path.parent == folder})
    temporaries: dict[Path, Path] = {}
    with contextlib.ExitStack() as locked:
        try:
            for path, data in files.items():
                temporaries[path] = path.with_name(f".{_stem(path.name)}.{uuid.uuid4().hex}")
                with contextlib.ExitStack() as opened:
                    file = opened.enter_context(_create(temporaries[path], lock=not new_names))
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    if fcntl is not None and not new_names:
                        locked.push(opened.pop_all())  # open until it has its name, because closing unlocks it
            for path, temporary in temporaries.items():
                os.replace(temporary, path)
        except BaseException:
            for temporary in temporaries.values():
                temporary.unlink(missing_ok=True)
            raise


def _stem(name: str) -> str:
    """Return the part of a temporary file's name that says whose it is."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _MAX_NAME else hashlib.sha256(encoded).hexdigest()


def _create(path: Path, *, lock: bool) -> BinaryIO:
    """Create a file and lock it."""
    while True:
        file = open(path, "xb")  # noqa: SIM115
        if fcntl is None or not lock:
            return file
        with contextlib.suppress(OSError):  # a file system without locks: nobody else can lock the file either
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # another writer took it for abandoned before it was locked


def _delete_abandoned(folder: Path, stems: Collection[str]) -> None:
    """Delete the temporary files of writers that no longer run."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            stem, _, digits = name.removeprefix(".").rpartition(".")
            if not name.startswith(".") or stem not in stems or len(digits) != 32:
                continue
            with contextlib.suppress(OSError):  # BlockingIOError: its writer is at work
                descriptor = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / name)
                finally:
                    os.close(descriptor)


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a text of unknown origin.

    Raises:
        ValueError: it is no object, no UTF-8, has NaN or infinity, nests deeper than 64 values, or has a number that
            Python cannot hold.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        _check_values(value, _MAX_DEPTH)
    except RecursionError:
        raise ValueError(f"its values are nested deeper than {_MAX_DEPTH}") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__}, no object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_values(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"its values are nested deeper than {_MAX_DEPTH}")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")  # such as 1e999
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_values(inner, depth - 1)


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
    return _read_tensors(path, with_tensors=True)


def load_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without reading its tensors.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """
    return _read_tensors(path, with_tensors=False)[1]


def _read_tensors(path: str | Path, *, with_tensors: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}; check the path")
    try:
        with safe_open(str(path), "pt") as file:
            names = file.keys() if with_tensors else ()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except Exception as error:  # beside its own error, that of a dtype that this torch does not have, for example
        if isinstance(error, MemoryError):
            raise
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); download or save it again"
        ) from error
