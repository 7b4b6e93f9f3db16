"""What commands print: notes on stderr, progress, tables of memories."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from icae_fast.core.memory import Memory

stderr = Console(stderr=True, soft_wrap=True)


def describe(memory: Memory) -> dict[str, Any]:
    """Return the figures of a memory as JSON values."""
    return {
        "tokens": memory.n_source_tokens,
        "spans": list(memory.span_lengths),
        "slots": memory.n_slots,
        "ratio": round(memory.compression_ratio, 3),
        "bytes": memory.nbytes,
    }


def print_memories(first: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print a row for each memory on stdout.

    Args:
        first: heading of the first column, the memories' names.
        rows: `describe` of each memory, and its name as "memory".
        as_json: print one JSON list instead of a table.
    """
    if as_json:
        print(json.dumps(rows))
        return
    from rich.table import Table

    table = Table(first, "tokens", "spans", "slots", "ratio", "KiB")
    for row in rows:
        table.add_row(
            row["memory"], str(row["tokens"]), str(len(row["spans"])), str(row["slots"]), f"{row['ratio']:.2f}",
            f"{row['bytes'] / 1024:.0f}",
        )  # fmt: skip
    Console().print(table)


@contextlib.contextmanager
def token_progress(task_name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr; the block calls the yielded function with (tokens done, tokens in all)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(task_name), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"))
    with Progress(*columns, TimeElapsedColumn(), console=stderr, transient=True) as progress:
        task = progress.add_task(task_name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
