"""What `make bench-encode` is held against: `python -m bench.targets docs/results/encode-MACHINE.json`.

Each measured figure stands beside its target with "met" or "missed"; a figure without one is there to be read.
Targets are judged on medians, and nothing fails when one is missed.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.encoders import BASELINE, COMPILED, EXPANDED, FROZEN, MERGED, SDPA

WIDTH = 160  # no line of the table breaks
AT_LEAST, AT_MOST = ">=", "<="


@dataclass(frozen=True)
class Target:
    """A bound for a figure.

    Args:
        sign: ">=" or "<=".
        plain, amx: the bound on a CPU without and with AMX, whose products are many times as fast and leave more of
            the time to all else.
    """

    sign: str
    plain: float
    amx: float

    def bound(self, amx: bool) -> float:
        """The one that counts on this machine."""
        return self.amx if amx else self.plain

    def met(self, value: float, amx: bool) -> bool:
        """Is it?"""
        return value >= self.bound(amx) if self.sign == AT_LEAST else value <= self.bound(amx)


OVER_BASELINE = Target(AT_LEAST, 2.2, 2.5)
OVER_COMPILED = Target(AT_LEAST, 1.5, 1.5)
OVER_GEMMS = Target(AT_MOST, 1.18, 1.5)
OVER_SDPA = Target(AT_LEAST, 4.0, 8.0)
EXPONENT = Target(AT_MOST, 1.03, 1.03)
LORA_COST_OVER_SHARE = Target(AT_MOST, 1.5, 1.5)


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Args:
        where, what: the row's name, and the figure's.
        ratio: median, and where they are known min, max and of_minima.
        target: None for a figure that is only there to be read.
    """

    where: str
    what: str
    ratio: dict[str, float]
    target: Target | None = None


def figures(row: dict[str, Any]) -> Iterator[Figure]:
    """What one row of the suite's results says."""
    if "exponent" in row:
        yield from _growth_figures(row)
    elif SDPA in row.get("speedup_over", ()):
        yield from _attention_figures(row)
    elif "time_over_gemms" in row:
        yield from _encoder_figures(row)


def _encoder_figures(row):
    # Targets are for the workload that runs all providers; the other models and shapes are there to be read.
    judged = "lora_cost" in row
    for name, target in ((BASELINE, OVER_BASELINE), (MERGED, None), (COMPILED, OVER_COMPILED), (FROZEN, None)):
        if name in row["speedup_over"]:
            yield Figure(row["case"], f"over {name}", row["speedup_over"][name], target if judged else None)
    yield Figure(row["case"], "time over bare GEMMs", row["time_over_gemms"], OVER_GEMMS if judged else None)
    if judged:
        over_share = {name: cost / row["lora_flops_share"] for name, cost in row["lora_cost"].items()}
        what = f"LoRA's time over its share, {row['lora_flops_share']:.1%}"
        yield Figure(row["case"], what, over_share, LORA_COST_OVER_SHARE)


def _attention_figures(row):
    best = min((SDPA, EXPANDED), key=lambda name: row["speedup_over"][name]["median"])
    judged = row["rows_by_tokens"].endswith("x640")  # a span of 512 tokens and its memory tokens
    yield Figure(
        f"attention {row['rows_by_tokens']}", f"over {best}", row["speedup_over"][best],
        OVER_SDPA if judged else None,
    )  # fmt: skip


def _growth_figures(row):
    points = row["points"]
    yield Figure(f"1 to {points[-1]['spans']} spans", "exponent of time", {"median": row["exponent"]}, EXPONENT)
    most = max(point["working_mb"] for point in points[:-1])
    what = "working memory over fewer spans'"
    yield Figure(f"{points[-1]['spans']} spans", what, {"median": points[-1]["working_mb"] / most})


def render(machine: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    """The table as text; empty if no row has a figure."""
    amx = "amx_bf16" in (machine["cpu_features"] or ())
    table = Table(title=f"{machine['cpu']}, {machine['threads']} threads, {'AMX' if amx else 'no AMX'}")
    for column in ("", "figure", "median", "min to max", "best times", "target", ""):
        table.add_column(column)
    for figure in (f for row in rows for f in figures(row)):
        ratio, target = figure.ratio, figure.target
        table.add_row(
            figure.where,
            figure.what,
            f"{ratio['median']:.4g}",
            f"{ratio['min']:.4g} to {ratio['max']:.4g}" if "min" in ratio else "",
            f"{ratio['of_minima']:.4g}" if "of_minima" in ratio else "",
            f"{target.sign} {target.bound(amx):g}" if target else "",
            ("met" if target.met(ratio["median"], amx) else "missed") if target else "",
        )
    if not table.row_count:
        return ""
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(table)
    return console.file.getvalue()


def main() -> None:
    """Show the table of the results named on the command line."""
    for name in sys.argv[1:]:
        result = json.loads(Path(name).read_text())
        print(render(result["machine"], result["rows"]))


if __name__ == "__main__":
    main()
