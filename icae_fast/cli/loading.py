"""Load what the arguments of a command name: texts, memories, adapters and base models."""

from __future__ import annotations

import codecs
import contextlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icae_fast.cli.output import stderr
from icae_fast.core.text import decode_text
from icae_fast.errors import InvalidInputError
from icae_fast.io.bundled import BUNDLED_NAME

if TYPE_CHECKING:
    from icae_fast.core.memory import Memory
    from icae_fast.model.icae import ICAE

MEMORY_SUFFIX = ".icae"
STDIN = Path("-")
_HEAD = 4096  # bytes of a file that show whether it is a text
UNTRAINED = (
    "note: this adapter is untrained: the pipeline is the real one, but the text that comes out of the memory is not "
    "yet the text that went in. Pass --adapter for a trained one."
)


def load(adapter: str | None, model: str, memory_size: int | None, rate: int | None, dtype: str) -> ICAE:
    """Load the ICAE that the options describe.

    Without an adapter and without sizes, this is the shipped adapter for the model if there is one. Otherwise,
    without an adapter, it is an untrained one of these sizes, the same in every call.

    Args:
        adapter: folder, hub id or name of a shipped adapter.
        model: path or hub id of the base model, or `BUNDLED_NAME`.
        memory_size: slots per span of an untrained adapter.
        rate: context tokens per slot.
        dtype: "bfloat16" or "float32".

    Raises:
        ICAEError: an option is wrong, or nothing can be loaded from it.
    """
    import torch

    from icae_fast import ICAE, ICAEConfig
    from icae_fast.io.hub import default_adapter, load_base_model, parse_dtype

    quieten_loading()
    torch_dtype = parse_dtype(dtype)
    if adapter is None and memory_size is None and rate is None and (default := default_adapter(model)):
        adapter = default[0]
    if adapter is not None:
        refuse_memory_size(memory_size)
        named = None if model == BUNDLED_NAME else model
        return ICAE.from_pretrained(adapter, base_model=named, dtype=torch_dtype, compression_rate=rate)
    stderr.print(UNTRAINED, style="yellow")
    base, tokenizer = load_base_model(model, ICAEConfig(), torch_dtype)
    torch.manual_seed(0)
    sizes = {"memory_size": memory_size, "compression_rate": rate}
    config = ICAEConfig().replace(**{name: value for name, value in sizes.items() if value is not None})
    return ICAE.from_base(base, config, tokenizer).eval()


def refuse_memory_size(memory_size: int | None) -> None:
    """Raise if --memory-size is given together with a saved adapter.

    Raises:
        InvalidInputError: see above.
    """
    if memory_size is not None:
        raise InvalidInputError("--memory-size is for untrained adapters; a saved one has a fixed size: leave it out")


def quieten_loading() -> None:
    """Switch off transformers' progress bars and its FutureWarnings, which a user of commands cannot act on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file, or of stdin for the path `-`.

    Raises:
        InvalidInputError: the file cannot be read, or is not UTF-8.
    """
    if path == STDIN:
        return decode_text(sys.stdin.buffer.read(), "stdin")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidInputError(f"there is no file {path}; check the path") from error
    except IsADirectoryError as error:
        raise InvalidInputError(f"{path} is a folder, not a text; give the files in it") from error
    except OSError as error:
        raise InvalidInputError(f"cannot read {path} ({error.strerror}); check the path") from error
    if path.suffix == MEMORY_SUFFIX and not _is_text(content[:_HEAD]):
        raise InvalidInputError(f"{path} is a memory, not a text; `icae-fast restore` writes out its text")
    return decode_text(content, str(path))


def read_prompts(memory: str, prompts: Sequence[str]) -> list[str]:
    """Return prompts, with the text on stdin for one that is `-`.

    Args:
        memory: the argument before the prompts, which may be `-` too.
        prompts: arguments of the command line.

    Raises:
        InvalidInputError: stdin is named twice, or is not UTF-8.
    """
    names = [memory, *prompts]
    if names.count(str(STDIN)) > 1:
        raise InvalidInputError("- names stdin more than once; give it for the memory or for one prompt")
    return [read_text(STDIN).strip() if prompt == str(STDIN) else prompt for prompt in prompts]


def check_memory_file(name: str) -> None:
    """Raise if a name cannot be a memory file, and say what was probably meant.

    Args:
        name: first argument of `ask` or `restore` without --store.

    Raises:
        InvalidInputError: the name is a folder, a text, or no file.
    """
    path = Path(name)
    if path.is_dir():
        raise InvalidInputError(f"{name} is a folder, not a memory; if it is a store, give --store {name} and a key")
    memory = path.with_name(path.name + MEMORY_SUFFIX)
    meant = f"did you mean {memory}?" if memory.is_file() else ""
    if not path.exists():
        raise InvalidInputError(f"there is no file {name}; {meant or 'check the path, or for a key give --store'}")
    if _begins_as_text(path):
        raise InvalidInputError(f"{name} is a text, not a memory; {meant or f'run `icae-fast compress {name}` first'}")


def _begins_as_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _is_text(file.read(_HEAD))
    except OSError:
        return False


def _is_text(head: bytes) -> bool:
    """Whether the head of a file is of a UTF-8 text; a memory file has NUL bytes in its first eight."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(head) and b"\0" not in head


@contextlib.contextmanager
def _memory_file(name: str) -> Iterator[Path]:
    """Yield the path of a memory file; what comes on stdin is in a temporary one."""
    if name != str(STDIN):
        check_memory_file(name)
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"stdin{MEMORY_SUFFIX}"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


def load_memory_for(
    memory: str, store: str | None, adapter: str | None, model: str, dtype: str, *, kv: bool = False
) -> tuple[ICAE, Memory]:
    """Load a memory and the ICAE that made it.

    Args:
        memory: a memory file, `-` for one on stdin, or a key if `store` is given.
        store: address of a memory store.
        adapter, model, dtype: see `load`. Without an adapter, the shipped one is used if it made the memory.
        kv: adopt stored keys and values, as in `MemoryStore.get`.

    Raises:
        ICAEError: the memory or the model cannot be loaded, or do not belong together.
    """
    from icae_fast import MemoryStore
    from icae_fast.store.memory_file import load_memory, read_memory_header

    if store is None:
        with _memory_file(memory) as path:
            icae = _maker(read_memory_header(path)[1], adapter, model, dtype)
            return icae, load_memory(path, icae)
    with MemoryStore(store, create=False) as opened:
        header = opened.header(memory)
    icae = _maker(header, adapter, model, dtype)
    with MemoryStore(store, icae, create=False) as opened:
        return icae, opened.get(memory, kv=kv)


def _maker(header: Mapping[str, Any], adapter: str | None, model: str, dtype: str) -> ICAE:
    """Load the ICAE that made the memory with this header; see `load_memory_for`."""
    from icae_fast.io.checkpoints import read_header
    from icae_fast.io.hub import default_adapter, resolve_adapter_folder

    memory_size, rate = header["config"]["memory_size"], header["config"]["compression_rate"]
    default = default_adapter(model)
    if adapter is None and default is not None:
        shipped = read_header(resolve_adapter_folder(default[0]))[1]
        adapter = default[0] if shipped["adapter_hash"] == header["adapter_hash"] else None
    return load(adapter, model, None if adapter else memory_size, rate, dtype)
