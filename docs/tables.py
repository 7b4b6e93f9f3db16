"""Writes the generated tables of README.md anew: `python -m docs.tables README.md`.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`. What ops there are, on which devices and
in which dtypes comes from the op specs alone, so the README cannot say anything else.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from icae_fast.ops import REGISTRY, OpSpec

# Device that each backend serves; a device without a compiled backend of its own is served by the reference.
DEVICES = {"reference": "without a kernel", "cpp": "CPU", "triton": "CUDA"}


def ops_table() -> str:
    """Op by backend by device by dtype, from the specs."""
    lines = ["| op | backend | device | dtypes | gradient |", "| --- | --- | --- | --- | --- |"]
    for spec in REGISTRY.values():
        for backend, dtypes in spec.dtypes.items():
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            lines.append(f"| `{spec.name}` | {backend} | {DEVICES[backend]} | {names} | {_gradient(spec)} |")
    return "\n".join(lines)


def _gradient(spec: OpSpec) -> str:
    return ", ".join(f"`{n}`" for n in spec.differentiable) or "is one"


TABLES = {"ops": ops_table}


def fill(text: str) -> str:
    """The text with every marked table written anew.

    Raises:
        KeyError: a marker names no table.
    """
    return re.sub(
        r"(<!-- table:(\w+) -->\n).*?(\n<!-- end -->)",
        lambda m: m[1] + TABLES[m[2]]() + m[3],
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(fill(path.read_text()))
