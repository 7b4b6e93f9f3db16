"""`icae-fast compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icae_fast.cli.loading import MEMORY_SUFFIX, load, read_text
from icae_fast.cli.options import Adapter, AsJson, Dtype, MemorySize, Model, Rate
from icae_fast.cli.output import describe, print_memories, token_progress
from icae_fast.errors import InvalidInputError
from icae_fast.io.bundled import BUNDLED_NAME

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE


def compress(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text files.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the memory files.")] = None,
    store: Annotated[str | None, typer.Option(help="Memory store for the memories; texts that it has are not compressed again.")] = None,  # noqa: E501
    kv: Annotated[bool, typer.Option("--kv", help="Also store keys and values, so that `ask` does not have to read the slots.")] = False,  # noqa: E501
    adapter: Adapter = None, model: Model = BUNDLED_NAME, memory_size: MemorySize = None, rate: Rate = None,
    dtype: Dtype = "bfloat16", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compress text files into memory files, or into a memory store.

    All files are compressed in one batch. A memory file (FILE.icae) is written beside its text, or into --output.
    """
    texts = [read_text(path) for path in files]
    targets = [(output or path.parent) / (path.name + MEMORY_SUFFIX) for path in files]
    if output is not None and store is not None:
        raise InvalidInputError("--output and --store name two places; give one of them")
    if kv and store is None:
        raise InvalidInputError("--kv needs a store, because a memory file contains only slots; give --store")
    if store is None and len(set(targets)) < len(targets):
        raise InvalidInputError(
            "two files would write the same memory; give them different names or compress them separately"
        )
    if output is not None and not output.is_dir():
        raise InvalidInputError(f"there is no folder {output}; create it first")
    icae = load(adapter, model, memory_size, rate, dtype)
    rows = _compress_into_store(texts, store, icae, kv) if store else _compress_into_files(texts, targets, icae)
    print_memories("key" if store else "memory file", rows, as_json)


def _compress_into_files(texts: list[str], targets: list[Path], icae: ICAE) -> list[dict[str, Any]]:
    from icae_fast.store.memory_file import save_memory

    with token_progress("compressing") as on_progress:
        memories = icae.compress(texts, on_progress=on_progress)
    for target, memory in zip(targets, memories, strict=True):
        save_memory(target, memory, icae)
    return [{"memory": str(t)} | describe(m) for t, m in zip(targets, memories, strict=True)]


def _compress_into_store(texts: list[str], path: str, icae: ICAE, kv: bool) -> list[dict[str, Any]]:
    from icae_fast import MemoryStore

    with MemoryStore(path, icae) as store, token_progress("compressing") as on_progress:
        memories = store.compress(texts, kv=kv, on_progress=on_progress)
        keys = [store.key_of(text) for text in texts]
    return [{"memory": key} | describe(memory) for key, memory in zip(keys, memories, strict=True)]
