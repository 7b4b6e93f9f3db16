"""What commands print: notes on stderr, progress, tables."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from icae_fast.io.console import DataConsole, printable, progress_bar, stderr_console

if TYPE_CHECKING:
    from rich.table import Table

    from icae_fast.core.memory import Memory

stderr = stderr_console()


def describe(memory: Memory) -> dict[str, Any]:
    """Return the figures of a memory as JSON values."""
    return {
        "tokens": memory.n_source_tokens,
        "spans": list(memory.span_lengths),
        "slots": memory.n_slots,
        "ratio": round(memory.compression_ratio, 3),
        "bytes": memory.nbytes,
    }


def print_table(table: Table) -> None:
    """Print a table on stdout: with borders and folded cells on a terminal, whole and without borders in a pipe.

    In a pipe or a file, a row is one line with tabs between its cells. The lines of the title and the headings come
    first, and that of the caption last.

    Args:
        table: its cells are data; markup in them is printed as it is.
    """
    if sys.stdout.isatty():
        for column in table.columns:
            column.overflow = "fold"
        DataConsole().print(table)
        return
    rows = [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]
    if table.show_header:
        rows.insert(0, [str(column.header).replace("\n", " ") for column in table.columns])
    lines = ["\t".join(printable(str(cell)) for cell in row) for row in rows]
    around = [[str(part)] if part else [] for part in (table.title, table.caption)]
    print("\n".join([*around[0], *lines, *around[1]]))


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
    print_table(table)


@contextlib.contextmanager
def token_progress(task_name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr; the block calls the yielded function with (tokens done, tokens in all)."""
    from rich.progress import BarColumn, TimeElapsedColumn

    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total} tokens", TimeElapsedColumn())
    with progress_bar(stderr, *columns) as progress:
        task = progress.add_task(task_name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
