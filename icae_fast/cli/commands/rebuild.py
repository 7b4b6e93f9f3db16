"""`icae-fast rebuild`."""

from __future__ import annotations

import typer

from icae_fast.cli.commands.list_store import StorePath
from icae_fast.cli.output import stderr


def rebuild(store: StorePath) -> None:
    """Make the index of a store again from its entries.

    No other process may use the store meanwhile. Files that cannot be read are named and left out, and the exit code is
    1 then.
    """
    from icae_fast import MemoryStore

    left_out = MemoryStore.rebuild(store)
    with MemoryStore(store, create=False) as opened:
        print(f"{len(opened)} entries")
    for file in left_out:
        stderr.print(f"left out, because it cannot be read: {file}", style="red")
    if left_out:
        raise typer.Exit(1)
