"""`icae-fast compress`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icae_fast.cli.ending import MISTAKE, SOME_FAILED, end_with
from icae_fast.cli.loading import MEMORY_SUFFIX, STDIN, load, read_text
from icae_fast.cli.options import Adapter, AsJson, Dtype, MemorySize, Model, Rate, at_home
from icae_fast.cli.output import describe, print_memories, token_progress
from icae_fast.errors import ICAEError, InvalidInputError
from icae_fast.io.bundled import BUNDLED_NAME

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE
    from icae_fast.store.compressing import Compressed


def compress(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text files, - for stdin.", callback=at_home)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the memory files.", callback=at_home)] = None,  # noqa: E501
    store: Annotated[str | None, typer.Option(help="Memory store for the memories; texts that it has are not compressed again.", callback=at_home)] = None,  # noqa: E501
    kv: Annotated[bool, typer.Option("--kv", help="Also store keys and values, so that `ask` does not have to read the slots.")] = False,  # noqa: E501
    adapter: Adapter = None, model: Model = BUNDLED_NAME, memory_size: MemorySize = None, rate: Rate = None,
    dtype: Dtype = "bfloat16", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compress text files into memory files, or into a memory store.

    A memory file (FILE.icae; stdin.icae for stdin) is written beside its text, or into --output. Files are compressed
    in batches, and each batch is written when it is done. A file that cannot be compressed is named at the end, and
    stops no other; the exit code is 1 then.
    """
    targets = [(output or path.parent) / (_name(path) + MEMORY_SUFFIX) for path in files]
    _check(files, targets, output, store, kv)
    texts, failed = _read(files)
    code = MISTAKE if len(files) == 1 else SOME_FAILED
    if not texts:
        end_with(failed, "compress", code)
    icae = load(adapter, model, memory_size, rate, dtype)
    rows: dict[int, dict[str, Any]] = {}
    places = list(texts)
    names = ["stdin" if files[i] == STDIN else str(files[i]) for i in places]
    paths = [targets[i] for i in places]
    try:
        for done in _compressed(icae, list(texts.values()), names, paths, store, kv):
            place = places[done.place]
            if done.memory is None:
                failed[place] = done.error or InvalidInputError(done.name)
            else:
                memory = str(done.key if store else targets[place])
                rows[place] = {"file": done.name, "memory": memory} | describe(done.memory)
    finally:  # what was written is said in any case
        if rows:
            print_memories("key" if store else "memory file", [rows[i] for i in sorted(rows)], as_json)
    end_with(failed, "compress", code)


def _name(path: Path) -> str:
    return "stdin" if path == STDIN else path.name


def _check(files: list[Path], targets: list[Path], output: Path | None, store: str | None, kv: bool) -> None:
    if output is not None and store is not None:
        raise InvalidInputError("--output and --store name two places; give one of them")
    if kv and store is None:
        raise InvalidInputError("--kv needs a store, because a memory file contains only slots; give --store")
    if files.count(STDIN) > 1:
        raise InvalidInputError("- names stdin more than once; give it once")
    if store is None and len(set(targets)) < len(targets):
        raise InvalidInputError(
            "two files would write the same memory; give them different names or compress them separately"
        )
    if output is not None and not output.is_dir():
        raise InvalidInputError(f"there is no folder {output}; create it first")


def _read(files: list[Path]) -> tuple[dict[int, str], dict[int, ICAEError]]:
    """Return the texts and the errors of files, by their places."""
    texts: dict[int, str] = {}
    failed: dict[int, ICAEError] = {}
    for place, path in enumerate(files):
        try:
            texts[place] = read_text(path)
        except InvalidInputError as error:
            failed[place] = error
    return texts, failed


def _compressed(
    icae: ICAE, texts: list[str], names: list[str], targets: list[Path], path: str | None, kv: bool
) -> Iterator[Compressed]:
    from icae_fast import MemoryStore
    from icae_fast.store.compressing import compress_into_files

    with token_progress("compressing") as on_progress:
        if path is None:
            yield from compress_into_files(icae, texts, targets, names, on_progress)
        else:
            with MemoryStore(path, icae) as store:
                yield from store.compress_each(texts, kv=kv, names=names, on_progress=on_progress)
