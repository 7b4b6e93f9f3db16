"""Checkpoint folders that are complete or absent: written under another name, synced, then renamed."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import sort_checkpoints

from icae_fast.config import ICAEConfig
from icae_fast.errors import CheckpointError, ConfigError
from icae_fast.io.checkpoints import CONFIG_FILE, TENSORS_FILE, read_header
from icae_fast.io.files import load_tensors, sync_folder
from icae_fast.io.identity import compare_identities, tensors_hash

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
PROGRESS_FILE = "progress.json"
FILES = (CONFIG_FILE, TENSORS_FILE, STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE, PROGRESS_FILE)


@contextlib.contextmanager
def atomic_folder(folder: Path, *, is_main: bool, any_process: Callable[[bool], bool]) -> Iterator[Path]:
    """Yield a folder to write into, which gets its name once all processes have written their part.

    Args:
        folder: the final name; an existing folder of this name is replaced.
        is_main: whether this process creates and renames the folder.
        any_process: collective call that returns whether a flag is set in any process.

    Yields:
        The folder under its temporary name; it exists in all processes.

    Raises:
        CheckpointError: it cannot be written in some process, usually because the disk is full. Its files are removed,
            and other folders are left as they are.
    """
    partial = folder.with_name(f".{folder.name}.partial")  # no pattern for checkpoints matches this name
    failure: Exception | None = None
    try:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
            partial.mkdir(parents=True)
    except OSError as error:
        failure = error
    if not any_process(failure is not None):
        try:
            yield partial
            if is_main:
                _sync(partial)
        except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:  # torch.save raises RuntimeError
            failure = error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if not any_process(failure is not None):
            if is_main:
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
                sync_folder(folder.parent)
            any_process(False)  # a barrier: no process continues before the folder has its name
            return
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
    reason = str(failure).splitlines()[0] if failure else "another process failed"
    raise CheckpointError(
        f"cannot write {folder} ({reason}); its files were removed and earlier checkpoints stand: free space or choose "
        "another output folder, and start again to continue from the last checkpoint"
    ) from failure


def _sync(folder: Path) -> None:
    """Flush a folder's files and directory entries to the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def missing_files(folder: Path) -> list[str]:
    """Return the names of the files that a complete checkpoint has and this folder lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def find_checkpoint(output: Path, resume: str) -> Path | None:
    """Return the checkpoint to continue from, or None to start anew.

    Args:
        output: folder of the checkpoints.
        resume: "auto" for the newest complete one, "never" for none, otherwise a checkpoint folder.

    Raises:
        CheckpointError: the given folder is not a complete checkpoint.
        ConfigError: "never", but the output folder holds checkpoints.
    """
    found = [Path(p) for p in sort_checkpoints(str(output))]
    if resume == "auto":
        complete = [p for p in found if not missing_files(p)]
        for path in found:
            if path not in complete:
                log.warning("%s is ignored: it lacks %s", path, ", ".join(missing_files(path)))
        return complete[-1] if complete else None
    if resume == "never":
        if found:
            raise ConfigError(
                f"{output} holds {found[-1].name}, which a new run would mix with its own; choose another output "
                "folder, delete it, or set train.resume to auto"
            )
        return None
    folder = Path(resume)
    if missing := missing_files(folder):
        raise CheckpointError(
            f"train.resume names {folder}, which lacks {', '.join(missing)}; give a checkpoint folder"
        )
    return folder


def read_adapter(
    folder: Path, config: ICAEConfig, base: dict[str, Any], keys: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint's adapter, checked against a run.

    Args:
        folder: the checkpoint.
        config: config of the run's adapter.
        base: identity of the run's base model.
        keys: keys of the trained tensors, in their order.

    Raises:
        CheckpointError: it has another config, or is damaged.
        BaseModelMismatchError: it was trained on another base model.
    """
    found, header = read_header(folder)
    compare_identities(base, header["base"], str(folder))
    tensors = load_tensors(folder / TENSORS_FILE)[0]
    if found != config:
        raise CheckpointError(
            f"{folder} holds an adapter with another config than this run's; continue with the settings it was "
            "begun with, or choose another output folder"
        )
    if tensors_hash((key, tensors[key]) for key in keys if key in tensors) != header["adapter_hash"]:
        raise CheckpointError(f"the adapter in {folder} is damaged; delete the folder to continue from an earlier one")
    return tensors
