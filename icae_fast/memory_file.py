"""A memory in a file of its own: slots as safetensors, with a header that says what made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icae_fast.config import ICAEConfig
from icae_fast.errors import BaseModelMismatchError, CheckpointError
from icae_fast.files import load_tensors, save_tensors
from icae_fast.identity import base_identity, check_base
from icae_fast.memory import Memory

if TYPE_CHECKING:
    from icae_fast.modeling import ICAE

FORMAT_VERSION = 1
_HEADER = "icae_memory"


def save_memory(path: str | Path, memory: Memory, icae: ICAE) -> None:
    """Write a memory and the identity of the model and adapter that made it, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    header = {
        "format_version": FORMAT_VERSION,
        "n_source_tokens": memory.n_source_tokens,
        "span_lengths": list(memory.span_lengths),
        "config": icae.config.to_dict(),
        "base": base_identity(icae.base_model),
        "adapter_hash": icae.adapter_hash(),
    }
    try:
        save_tensors(path, {"slots": memory.slots}, {_HEADER: json.dumps(header)})
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; free space or choose another path") from error


def read_memory_header(path: str | Path) -> tuple[Memory, dict[str, Any]]:
    """The memory in a file and its header, whatever model made it.

    Raises:
        CheckpointError: truncated, or no memory file.
    """
    tensors, metadata = load_tensors(path)
    try:
        header = json.loads(metadata[_HEADER])
        version, slots = header["format_version"], tensors["slots"]
        memory = Memory(slots, header["n_source_tokens"], tuple(header["span_lengths"]))
        ICAEConfig.from_dict(header["config"]), header["base"], header["adapter_hash"]
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no memory file; make one with `icae-fast compress`") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; install a newer icae-fast to read it")
    return memory, header


def load_memory(path: str | Path, icae: ICAE) -> Memory:
    """A memory of this very model and adapter from a file, on the model's device.

    Raises:
        CheckpointError: truncated, or no memory file.
        BaseModelMismatchError: another base model or another adapter made it.
    """
    memory, header = read_memory_header(path)
    check_base(icae.base_model, header["base"], str(path))
    if header["adapter_hash"] != icae.adapter_hash():
        raise BaseModelMismatchError(f"{path} was made with another adapter; pass that adapter, or compress again")
    return memory.to(device=icae.device, dtype=icae.dtype)
