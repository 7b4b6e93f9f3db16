"""What one measurement gives: a table, the plots to draw of it, and the records behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Value = float | int | str | None  # of a cell; None where there is nothing to tell


@dataclass(frozen=True)
class Plot:
    """A plot of a result's rows; `icae_fast.training.evaluation.plots` draws it.

    Args:
        kind: "line", or "bar" for groups of bars.
        x, y: columns.
        series: column whose values are the lines, or the bars of a group; None for one.
        low, high: columns of the spread, such as quartiles, drawn as a band or as whiskers.
        x_log: a logarithmic x axis of base 2.
        x_label, y_label: of the axes; the columns' names by default.
        y_max: the y axis goes from 0 to this, such as 1 for shares; None for what the values need.
    """

    kind: Literal["line", "bar"]
    x: str
    y: str
    series: str | None = None
    low: str | None = None
    high: str | None = None
    x_log: bool = False
    x_label: str = ""
    y_label: str = ""
    y_max: float | None = None


@dataclass
class Result:
    """One measurement.

    Args:
        name: of its files: "restoration_by_length".
        title: what it shows.
        columns: what each column is, with its unit; in the table's order.
        rows: cells by column.
        facts: the protocol, as JSON values: sizes, seeds, what was skipped, failed or tried again.
        notes: sentences under the table.
        plots: drawn side by side.
        samples: raw records by sample, JSON values, for a file of their own.
        text: Markdown below the notes, such as examples side by side.
        headline: columns that a terminal shows, where all would be too many for its width; all by default.
        unfinished: what has failed and is made good by another run, in a sentence; empty if nothing has.
    """

    name: str
    title: str
    columns: dict[str, str]
    rows: list[dict[str, Value]]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    samples: Sequence[dict[str, Any]] = ()
    text: str = ""
    headline: Sequence[str] = ()
    unfinished: str = ""
