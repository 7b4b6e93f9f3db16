"""Checkpoints that are whole or not there: written under another name, synced, then renamed."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import sort_checkpoints

from icae_fast.errors import CheckpointError, ConfigError
from icae_fast.io.checkpoints import CONFIG_FILE, TENSORS_FILE
from icae_fast.io.files import sync_folder

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
PROGRESS_FILE = "progress.json"
FILES = (CONFIG_FILE, TENSORS_FILE, STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE, PROGRESS_FILE)


@contextlib.contextmanager
def atomic_folder(folder: Path, *, is_main: bool, any_process: Callable[[bool], bool]) -> Iterator[Path]:
    """A folder to write into, which takes its name when all processes have written what is theirs.

    Args:
        folder: the name; a folder that has it is replaced.
        is_main: whether this process makes and renames it.
        any_process: tells whether a flag is set in any process; all of them call it.

    Yields:
        the folder under its temporary name; it exists in all processes.

    Raises:
        CheckpointError: it cannot be written in some process, a full disk being the usual reason; nothing of it is
            left, and other folders stay as they are.
    """
    partial = folder.with_name(f".{folder.name}.partial")  # which no pattern for checkpoints matches
    failure: Exception | None = None
    try:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir(parents=True)
    except OSError as error:
        failure = error
    if not any_process(failure is not None):
        try:
            yield partial
            if is_main:
                _sync(partial)
        except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:  # torch.save's is a RuntimeError
            failure = error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if not any_process(failure is not None):
            if is_main:
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
                sync_folder(folder.parent)
            any_process(False)  # nobody goes on before it is there
            return
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
    reason = str(failure).splitlines()[0] if failure else "another process could not"
    raise CheckpointError(
        f"cannot write {folder} ({reason}); nothing of it is left, and earlier checkpoints stand: free space or choose "
        "another output folder, and start again to go on from the last one"
    ) from failure


def _sync(folder: Path) -> None:
    """Have a folder's files and their names on the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def missing_files(folder: Path) -> list[str]:
    """Files that a complete checkpoint has and this folder has not."""
    return [name for name in FILES if not (folder / name).is_file()]


def find_checkpoint(output: Path, resume: str) -> Path | None:
    """The checkpoint to go on from.

    Args:
        output: folder of the checkpoints.
        resume: "auto" for the newest complete one, "never" for none, else its folder.

    Returns:
        Its folder, or None where training starts anew.

    Raises:
        CheckpointError: the folder that was asked for is no complete checkpoint.
        ConfigError: "never", but the output folder holds checkpoints.
    """
    found = [Path(p) for p in sort_checkpoints(str(output))]
    if resume == "auto":
        complete = [p for p in found if not missing_files(p)]
        for path in found:
            if path not in complete:
                log.warning("%s is left out: it lacks %s", path, ", ".join(missing_files(path)))
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
