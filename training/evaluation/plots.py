"""Draw the plots of a result as PNG and SVG."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any, TypeGuard

from icae_fast.training.evaluation.measures import optional_package
from icae_fast.training.evaluation.result import Plot, Result

_COLORS = ("#1f6fb4", "#c8501e", "#2e8b57", "#8457a8", "#b8860b", "#5a6570", "#c03a76", "#178f9c")
_MARKERS = "osD^vPX*"
_HEADROOM = 0.03  # extra share of an axis with a fixed end, so that markers at the end are not cut
_INCHES = (5.6, 4.4)  # size of one plot
_LABEL_WIDTH = 56  # characters that fit below one plot, over all bar labels


def draw(result: Result) -> dict[str, bytes]:
    """Draw the plots of a result side by side.

    Rows without a value for x or y are skipped, and plots without any row are left out.

    Args:
        result: has the rows and the plots.

    Returns:
        `{".png": ..., ".svg": ...}`, the same bytes for the same result; empty if there is nothing to draw.

    Raises:
        InvalidInputError: matplotlib is not installed.
    """
    plots = [(plot, rows) for plot in result.plots if (rows := _points(plot, result.rows))]
    if not plots:
        return {}
    optional_package("matplotlib").use("Agg")
    pyplot = optional_package("matplotlib.pyplot")
    # Text stays text and the date is left out, so that the same figures give the same file.
    with pyplot.rc_context({"svg.hashsalt": result.name, "svg.fonttype": "none", "font.size": 10}):
        figure, axes = pyplot.subplots(
            1, len(plots), figsize=(_INCHES[0] * len(plots), _INCHES[1]), layout="constrained", squeeze=False
        )
        for (plot, rows), panel in zip(plots, axes[0], strict=True):
            (_lines if plot.kind == "line" else _bars)(panel, plot, rows)
            panel.set_xlabel(plot.x_label or plot.x)
            panel.set_ylabel(plot.y_label or plot.y)
            panel.grid(True, axis="both" if plot.kind == "line" else "y", alpha=0.3)
            panel.set_axisbelow(True)
            if plot.y_max is not None:
                panel.set_ylim(-_HEADROOM * plot.y_max if plot.kind == "line" else 0, (1 + _HEADROOM) * plot.y_max)
        figure.suptitle(result.title, fontsize=11)
        _legend(figure, axes[0])
        files = {".png": io.BytesIO(), ".svg": io.BytesIO()}
        figure.savefig(files[".png"], format="png", dpi=150, metadata={"Software": None})
        figure.savefig(files[".svg"], format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return {suffix: file.getvalue() for suffix, file in files.items()}


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """Add one legend for all plots below them, where it hides nothing."""
    entries: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = min(len(entries), 2 * len(axes))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _points(plot: Plot, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that have x and a finite y."""
    return [row for row in rows if row.get(plot.x) is not None and _is_finite(row.get(plot.y))]


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _by_series(plot: Plot, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault("" if plot.series is None else str(row.get(plot.series)), []).append(row)
    return found


def _lines(axes: Any, plot: Plot, rows: Sequence[dict[str, Any]]) -> None:
    for i, (name, own) in enumerate(_by_series(plot, rows).items()):
        own = sorted(own, key=lambda row: row[plot.x])
        color = _COLORS[i % len(_COLORS)]
        xs = [row[plot.x] for row in own]
        axes.plot(xs, [row[plot.y] for row in own], color=color, marker=_MARKERS[i % len(_MARKERS)], label=name or None)
        spread = [(row[plot.x], *ends) for row in own if (ends := _spread(plot, row))]
        if spread:
            axes.fill_between(*zip(*spread, strict=True), color=color, alpha=0.15, linewidth=0)
    if plot.x_log:
        ticks = sorted({row[plot.x] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()


def _bars(axes: Any, plot: Plot, rows: Sequence[dict[str, Any]]) -> None:
    series = _by_series(plot, rows)
    groups: dict[Any, list[str]] = {}  # the series that have a bar at each x
    for name, own in series.items():
        for row in own:
            groups.setdefault(row[plot.x], []).append(name)
    places = {x: i for i, x in enumerate(dict.fromkeys(row[plot.x] for row in rows))}
    width = 0.8 / max(map(len, groups.values()))
    for i, (name, own) in enumerate(series.items()):
        present = [groups[row[plot.x]] for row in own]
        shifts = [names.index(name) - (len(names) - 1) / 2 for names in present]
        xs = [places[row[plot.x]] + shift * width for row, shift in zip(own, shifts, strict=True)]
        color = _COLORS[i % len(_COLORS)]
        axes.bar(xs, [row[plot.y] for row in own], 0.92 * width, color=color, label=name or None)
        spread = [(x, *ends) for x, row in zip(xs, own, strict=True) if (ends := _spread(plot, row))]
        if spread:
            axes.vlines(*zip(*spread, strict=True), color="black", linewidth=1.2)
    _label_groups(axes, [str(x) for x in places])


def _label_groups(axes: Any, labels: Sequence[str]) -> None:
    """Label groups of bars, with wrapped text, or slanted text if wrapped labels do not fit."""
    width = _LABEL_WIDTH // len(labels)
    wrapped = [textwrap.wrap(label, max(1, width), break_long_words=False) or [""] for label in labels]
    if all(len(line) <= width for lines in wrapped for line in lines):
        axes.set_xticks(range(len(labels)), ["\n".join(lines) for lines in wrapped])
    else:
        axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor")


def _spread(plot: Plot, row: dict[str, Any]) -> tuple[float, float] | None:
    """Return the finite ends of a row's spread, or None."""
    if plot.low is None or plot.high is None:
        return None
    low, high = row.get(plot.low), row.get(plot.high)
    return (low, high) if _is_finite(low) and _is_finite(high) else None
