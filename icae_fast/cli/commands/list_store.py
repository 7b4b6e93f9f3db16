"""`icae-fast list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icae_fast.cli.options import AsJson
from icae_fast.cli.output import describe, print_memories
from icae_fast.errors import InvalidInputError


def list_store(
    store: Annotated[str, typer.Argument(help="A memory store: a folder, or an fsspec address.")],
    as_json: AsJson = False,
) -> None:
    """List the memories of a store."""
    from icae_fast import MemoryStore

    if Path(store).is_file():
        raise InvalidInputError(
            f"{store} is a file, not a memory store; give the folder of `icae-fast compress --store`"
        )
    with MemoryStore(store, create=False) as opened:
        rows = [{"memory": key} | describe(opened.get(key)) for key in opened.keys()]  # noqa: SIM118
    print_memories("key", rows, as_json)
