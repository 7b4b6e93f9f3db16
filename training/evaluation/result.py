"""The result of a measurement: a table, its plots, and the raw records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Value = float | int | str | None  # value of a cell; None for a missing value


@dataclass(frozen=True)
class Plot:
    """A plot of a result's rows; `icae_fast.training.evaluation.plots` draws it.

    Args:
        kind: "line", or "bar" for groups of bars.
        x, y: columns.
        series: column that separates lines, or the bars of a group; None for a single one.
        low, high: columns of the spread (e.g. quartiles), drawn as a band or as whiskers.
        x_log: use a logarithmic x axis of base 2.
        x_label, y_label: axis labels, by default the column names.
        y_max: end of the y axis, which then starts at 0 (e.g. 1 for shares); None fits the values.
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
    """The result of one measurement.

    Args:
        name: base name of its files, e.g. "restoration_by_length".
        title: title of the table.
        columns: meaning and unit of each column, in the table's order.
        rows: cells by column.
        facts: the protocol as JSON values: sizes, seeds, what was skipped, failed or retried.
        notes: sentences below the table.
        plots: plots, drawn side by side.
        samples: raw records by sample as JSON values, written to a separate file.
        text: Markdown below the notes, e.g. examples side by side.
        headline: columns shown in a terminal if it is too narrow for all; empty shows all.
        unfinished: a sentence about failures that another run can repair; empty if there are none.
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
