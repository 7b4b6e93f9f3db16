"""Checkpoint folders that are whole or ignored.

A checkpoint is written under another name, synced, then renamed. Its last file, `checkpoint.json`, records size and
CRC-32 of all others. So a folder that was cut off, emptied or changed by a fault of the disk is found before it is
loaded. CRC-32 detects all damage within four consecutive bytes, and misses other damage once in 2^32.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from icae_fast.config import ICAEConfig
from icae_fast.errors import CheckpointError, ConfigError, ICAEError
from icae_fast.io.checkpoints import CONFIG_FILE, TENSORS_FILE, read_header
from icae_fast.io.files import load_tensors, sync_folder, write_atomically
from icae_fast.io.identity import compare_identities, tensors_hash

log = logging.getLogger(__name__)

RECORD_FILE = "checkpoint.json"
RECORD_VERSION = 1
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
PROGRESS_FILE = "progress.json"
FILES = (CONFIG_FILE, TENSORS_FILE, STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE, PROGRESS_FILE)

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL, _DELETED = "partial", "deleted"
_CHUNK = 1 << 24
_FAILURES = (OSError, RuntimeError, SafetensorError, CheckpointError)  # torch.save raises RuntimeError on a full disk


@contextlib.contextmanager
def atomic_folder(folder: Path, *, is_main: bool, any_process: Callable[[bool], bool]) -> Iterator[Path]:
    """Yield a folder to write into, which gets its record and its name once all processes have written their part.

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
    partial = _hidden(folder, _PARTIAL)
    failure: Exception | None = None

    def done(part: Callable[[], Any] | None = None) -> bool:
        """Do a part of the work in the main process; return whether no process has failed. Each call is a barrier."""
        nonlocal failure
        try:
            if is_main and part is not None:
                part()
        except _FAILURES as error:
            failure = error
        return not any_process(failure is not None)

    if done(lambda: _make_room(partial)):
        try:
            yield partial
        except _FAILURES as error:
            failure = error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if done() and done(lambda: _seal(partial)) and done(lambda: _rename(partial, folder)):
            return
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
    reason = (str(failure).splitlines() or [type(failure).__name__])[0] if failure else "another process failed"
    raise CheckpointError(
        f"cannot write {folder} ({reason}); its files were removed and earlier checkpoints stand: free space or choose "
        "another output folder, and start again to continue from the last checkpoint"
    ) from failure


def _hidden(folder: Path, what: str) -> Path:
    """Return the name of a folder that is being written or deleted; no pattern for checkpoints matches it."""
    return folder.with_name(f".{folder.name}.{what}")


def _make_room(partial: Path) -> None:
    """Create the folder, and delete what killed processes left of it and of others."""
    for what in (_PARTIAL, _DELETED):
        for left in partial.parent.glob(f".checkpoint-*.{what}"):
            shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)


def _seal(folder: Path) -> None:
    """Write the record of a folder's files, and flush everything to the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    files = {path.name: _measure(path) for path in sorted(folder.iterdir())}
    write_atomically({folder / RECORD_FILE: _record_of(files)})
    sync_folder(folder)


def _rename(partial: Path, folder: Path) -> None:
    delete_checkpoint(folder)
    os.replace(partial, folder)
    sync_folder(folder.parent)


def _measure(path: Path) -> dict[str, Any]:
    """Return size and CRC-32 of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"size": size, "crc32": f"{crc:08x}"}


def _record_of(files: dict[str, Any]) -> bytes:
    """Return the only record of these files, with a checksum of its own."""
    crc = zlib.crc32(json.dumps(files).encode())
    record = {"version": RECORD_VERSION, "crc32": f"{crc:08x}", "files": files}
    return (json.dumps(record, indent=1) + "\n").encode()


def list_checkpoints(output: Path) -> list[Path]:
    """Return the folders `checkpoint-N` in an output folder by N; others, such as `checkpoint-4-copy`, are a user's."""
    numbers = {
        p: int(match[1]) for p in output.glob("checkpoint-*") if (match := _NAME.fullmatch(p.name)) and p.is_dir()
    }
    return sorted(numbers, key=lambda path: numbers[path])


def missing_files(folder: Path) -> list[str]:
    """Return the names of the files that each checkpoint has and this folder lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, as the end of a sentence about it, or None if it is whole."""
    try:
        if missing := missing_files(folder):
            return f"lacks {', '.join(missing)}"
        content = (folder / RECORD_FILE).read_bytes()
        record = json.loads(content)
        version, files = record["version"], record["files"]
        if version != RECORD_VERSION:
            return f"has a {RECORD_FILE} of version {version!r}, and this version of icae-fast reads {RECORD_VERSION}"
        if content != _record_of(files) or not set(files) >= set(FILES):
            return f"has a damaged {RECORD_FILE}"
        return next((damage for name in files if (damage := _file_damage(folder / name, files[name]))), None)
    except FileNotFoundError:
        return f"lacks {RECORD_FILE}: it was cut off, or is of an earlier version"
    except OSError as error:
        return f"cannot be read ({error})"
    except (ValueError, LookupError, TypeError, RecursionError):
        return f"has a damaged {RECORD_FILE}"


def _file_damage(path: Path, recorded: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"lacks {path.name}"
    if (size := path.stat().st_size) != recorded["size"]:
        return f"has {size} bytes in {path.name} instead of {recorded['size']}"
    if _measure(path)["crc32"] != recorded["crc32"]:
        return f"has a damaged {path.name} (its checksum is wrong)"
    return None


def find_checkpoint(output: Path, resume: str) -> Path | None:
    """Return the checkpoint to continue from, or None to start anew.

    Args:
        output: folder of the checkpoints.
        resume: "auto" for the newest whole one, "never" for none, otherwise a checkpoint folder.

    Raises:
        CheckpointError: the given folder is not a whole checkpoint, or with "auto" none of several is.
        ConfigError: "never", but the output folder holds checkpoints.
    """
    found = list_checkpoints(output)
    if resume == "auto":
        damage = None
        for path in reversed(found):
            damage = find_damage(path)
            if damage is None:
                return path
            log.warning("%s is ignored: it %s", path, damage)
        if found:
            raise CheckpointError(
                f"no checkpoint in {output} is whole: {found[0].name} {damage}; name one of an earlier version in "
                "train.resume, or delete them or choose another output folder to start anew"
            )
        return None
    if resume == "never":
        if found:
            raise ConfigError(
                f"{output} holds {found[-1].name}, which a new run would mix with its own; choose another output "
                "folder, delete it, or set train.resume to auto"
            )
        return None
    folder = Path(resume)
    if not missing_files(folder) and not (folder / RECORD_FILE).exists():
        log.warning("%s has no %s, so its files cannot be checked for damage", folder, RECORD_FILE)
    elif damage := find_damage(folder):
        raise CheckpointError(f"train.resume names {folder}, which {damage}; give a whole checkpoint folder")
    return folder


def set_aside_newer(output: Path, found: Path) -> None:
    """Rename the checkpoints after `found`, the newest whole one, to `damaged-checkpoint-N`.

    They are kept, and no longer count among those that `keep_newest` keeps.
    """
    existing = list_checkpoints(output)
    for path in existing[existing.index(found) + 1 :]:
        aside = path.with_name(f"damaged-{path.name}")
        with contextlib.suppress(OSError):  # its old name does no harm to a resume
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            log.warning("%s is now called %s", path, aside.name)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, if there is one; a process killed in it leaves a whole one or none."""
    gone = _hidden(folder, _DELETED)
    with contextlib.suppress(OSError):
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def keep_newest(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond a limit; `newest` and the best one stay.

    transformers' `rotate_checkpoints` keeps the one with the highest number in place of `newest`, which is another one
    after a resume from an earlier checkpoint.

    Args:
        newest: the checkpoint just written. Those with higher numbers are left alone.
        limit: number of checkpoints that are kept, including `newest` and the best one; None or 0 keeps all.
        best: path of the best one, or None.
    """
    if not limit:
        return
    existing = list_checkpoints(newest.parent)
    earlier = existing[: existing.index(newest)]
    others = [path for path in earlier if best is None or path != Path(best)]
    room = max(limit - 1 - (len(earlier) - len(others)), 0)
    for path in others[: max(len(others) - room, 0)]:
        delete_checkpoint(path)


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn any error of reading a checkpoint into a `CheckpointError`; a damaged pickle may raise anything."""
    try:
        yield
    except ICAEError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(
            f"{folder} cannot be loaded ({reason}); continue with the settings it was begun with, "
            "or name another checkpoint in train.resume"
        ) from error


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
