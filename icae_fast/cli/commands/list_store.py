"""`icae-fast list`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icae_fast.cli.ending import SOME_FAILED, end_with
from icae_fast.cli.options import AsJson, at_home
from icae_fast.cli.output import describe, print_memories
from icae_fast.errors import CheckpointError, ICAEError, InvalidInputError, MemoryNotFoundError

if TYPE_CHECKING:
    from icae_fast.store.store import MemoryStore

StorePath = Annotated[
    str, typer.Argument(help="A memory store: a folder, or an fsspec address.", metavar="STORE", callback=at_home)
]


def list_store(store: StorePath, as_json: AsJson = False) -> None:
    """List the memories of a store.

    Only headers are read. Damaged entries are named after the list of all others, and the exit code is 1 then.
    """
    rows: list[dict[str, Any]] = []
    damaged: dict[int, ICAEError] = {}
    with opened_store(store) as opened:
        for place, key in enumerate(opened.keys()):
            try:
                rows.append({"memory": key} | describe(opened.outline(key)))
            except MemoryNotFoundError:  # deleted since it was listed
                continue
            except CheckpointError as error:
                damaged[place] = error
    print_memories("key", rows, as_json)
    end_with(damaged, "list", SOME_FAILED)


def opened_store(path: str) -> MemoryStore:
    """Return the store that an argument names.

    Raises:
        ICAEError: it is none.
    """
    from icae_fast import MemoryStore

    if Path(path).is_file():
        raise InvalidInputError(
            f"{path} is a file, not a memory store; give the folder of `icae-fast compress --store`"
        )
    return MemoryStore(path, create=False)
