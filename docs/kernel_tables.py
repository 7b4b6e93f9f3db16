"""The tables of docs/kernels.md about kernels on GPUs, from docs/results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEADINGS = ("kernel", "architecture", "registers", "spills, bytes", "shared memory, KB", "occupancy", "tensor cores")


def kernel_cells(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """A line for each kernel and architecture: the worst over configurations and dtypes."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    for (kernel, arch), group in sorted(groups.items()):
        used = sorted({name for row in group if row["dots"] for name in row["tensor_cores"] or ["none"]})
        most = {name: max(row[name] for row in group) for name in ("registers", "spills", "shared")}
        yield [
            kernel, f"sm_{arch}", str(most["registers"]), str(most["spills"]), f"{most['shared'] / 1024:.1f}",
            f"{min(row['occupancy'] for row in group):.0%}", ", ".join(used) or "-",
        ]  # fmt: skip


def kernels_table() -> str:
    """`docs/results/kernels.json`, a line for each kernel and architecture."""
    result = json.loads((RESULTS / "kernels.json").read_text())
    rows = result["rows"]
    lines = [
        f"Compiled by Triton {result['triton']} for GPUs that were not there, {len(rows)} times in all; each line is "
        "the worst of a kernel's configurations, in bf16 and fp16:",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"| {' | '.join('---' for _ in HEADINGS)} |",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in kernel_cells(rows))])
