"""`icae-fast clean`."""

from __future__ import annotations

from typing import Annotated

import typer

from icae_fast.cli.commands.list_store import StorePath, opened_store


def clean(
    store: StorePath,
    older_than: Annotated[float, typer.Option(min=0, help="Minimum age of a file in seconds; younger ones may belong to a process at work.")] = 3600.0,  # noqa: E501
) -> None:  # fmt: skip
    """Delete the files that killed processes left in a store; entries stay."""
    with opened_store(store) as opened:
        print(f"{opened.clean(older_than)} files deleted")
