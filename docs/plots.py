"""Draw every plot of docs/results from the published figures: `python -m docs.plots`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from docs.overview import OVERVIEW, comparisons, draw_overview
from docs.tables import RESULTS, plot_name

OURS, BASELINE = "icae_fast", "baseline"
COLORS = {OURS: "#1f6fb4", BASELINE: "#c8501e"}
NAMES = {OURS: "icae_fast", BASELINE: "baseline (the reference's way)"}


def step_memory(result: dict[str, Any], path: Path) -> None:
    """Draw the peak memory of a training step against its context, on two log axes; extrapolated points are hollow.

    Args:
        result: results of `make bench-train` that hold a row with `memory`.
        path: output path without a suffix; `.png` and `.svg` are written.
    """
    row = next(row for row in result["rows"] if "memory" in row)
    with _figure(path) as axes:
        for name, found in row["memory"].items():
            _line(axes, name, found)
        lengths = [point["tokens"] for point in next(iter(row["memory"].values()))["points"]]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=30)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda gb, _: f"{gb:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("peak memory above the weights, GB")
        axes.set_title(
            f"One training step: {row['case']}, {row['objective']} of {row['target_tokens']} tokens", fontsize=11
        )
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(loc="upper left", frameon=False)


@contextmanager
def _figure(path: Path) -> Iterator[Axes]:
    """Yield axes to draw on, and write them as `.png` and `.svg` afterwards."""
    # Text stays text and the date is left out, so that equal figures make equal files.
    with plt.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none", "font.size": 11}):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        yield axes
        figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)


def adapter_curves(result: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of an adapter over its training runs, discarded runs included.

    Args:
        result: has `runs`, each with a `name`, `points` and `held_out` (lists of (core hours, accuracy)) and `failed`
            (true if nothing of the run was kept); `xlabel` and `ylabel` override the axis labels.
        path: output path without a suffix; `.png` and `.svg` are written.
    """
    with _figure(path) as axes:
        dashes = cycle(["-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1))])
        for run in result["runs"]:
            failed = {"color": "0.5", "linewidth": 1.2, "linestyle": next(dashes)} if run["failed"] else None
            style = failed or {"linewidth": 2}
            (line,) = axes.plot(*zip(*run["points"], strict=True), label=run["name"], **style)
            if run["held_out"]:
                axes.plot(*zip(*run["held_out"], strict=True), "o", color=line.get_color(), markersize=4)
        axes.set_xlabel(result.get("xlabel", "core hours since the run began"))
        axes.set_ylabel(result.get("ylabel", "accuracy (dots: held-out text)"))
        axes.set_ylim(0, 1)
        axes.set_title(result["title"], fontsize=11)
        axes.grid(True, alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=2, frameon=False, fontsize=7)


def _line(axes: Axes, name: str, found: dict[str, Any]) -> None:
    points, color = found["points"], COLORS[name]
    measured = [p for p in points if not p["extrapolated"]]
    rest = [p for p in points if p["extrapolated"]]
    label = f"{NAMES[name]}, {found['bytes_per_token'] / 1e3:,.0f} KB a context token"

    def draw(chosen: list[dict[str, Any]], **style: Any) -> None:
        axes.plot([p["tokens"] for p in chosen], [p["peak_mb"] / 1e3 for p in chosen], color=color, **style)

    draw(measured, marker="o", label=label)
    if rest:
        draw([measured[-1], *rest], linestyle="--")
        draw(rest, marker="o", linestyle="none", markerfacecolor="white", label=f"{name}, extrapolated")


def main() -> None:
    """Draw the overview, every `train-*.json` that holds a memory row, and every `adapter-*.json`."""
    if bars := comparisons(RESULTS):
        draw_overview(bars, RESULTS / OVERVIEW.name)
    for results in sorted(RESULTS.glob("train-*.json")):
        result = json.loads(results.read_text())
        if any("memory" in row for row in result["rows"]):
            step_memory(result, RESULTS / plot_name(results))
    for results in sorted(RESULTS.glob("adapter-*.json")):
        adapter_curves(json.loads(results.read_text()), results.with_suffix(""))


if __name__ == "__main__":
    main()
