"""`icae-fast delete`."""

from __future__ import annotations

from typing import Annotated

import typer

from icae_fast.cli.commands.list_store import StorePath, opened_store
from icae_fast.cli.ending import MISTAKE, SOME_FAILED, end_with
from icae_fast.cli.options import as_text
from icae_fast.errors import ICAEError, MemoryNotFoundError


def delete(
    store: StorePath,
    keys: Annotated[list[str], typer.Argument(help="Keys, as `icae-fast list` shows them.", callback=as_text)],
) -> None:  # fmt: skip
    """Delete memories from a store, also damaged ones.

    A key that the store does not have is named at the end, and the exit code is 1 then.
    """
    absent: dict[int, ICAEError] = {}
    with opened_store(store) as opened:
        for place, key in enumerate(dict.fromkeys(keys)):
            if not opened.delete(key):
                absent[place] = MemoryNotFoundError(f"the store {store} has no entry {key!r}; see its keys()")
    end_with(absent, "delete", MISTAKE if len(keys) == 1 else SOME_FAILED)
