"""The README's plot: how icae_fast compares with the baseline on every CPU that has published results.

Figures are those of the newest `encode-*.json`, `decode-*.json` and `train-*.json` of a CPU in docs/results. Two files
are written, for GitHub's light and dark theme.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from docs.tables import RESULTS

OVERVIEW = RESULTS / "overview"
SUITES = ("encode", "decode", "train")
COMPRESS_CASE = "smollm2-135m-bf16-8x512"
OURS, BASELINE, KV_TIER = "icae_fast", "baseline", "icae_fast KV tier"
ONE_BY_ONE, GENERATE = "baseline one by one", "generate"
# Groups of bars from top to bottom.
TASKS = {
    "compress": "Compress 8 documents\nof 512 tokens",
    "first token, slots": "First token,\nslots stored",
    "first token, KV": "First token,\nkeys and values stored",
    "token": "Each further token*",
    "questions": "16 questions about\none document**",
    "step": "Training step",
    "memory": "Memory of a training step",
}
TITLE = "Times as fast as the reference's ICAE; last row: times less memory"
NOTES = (
    "SmolLM2-135M in bf16, document of 4,096 tokens (further tokens: 512; training: 2,048). Medians of ratios and of times.",  # noqa: E501
    "* against transformers' generate on the same memory   ** the reference compresses once; timed for 2, scaled to 16",
)
THEMES = {
    "": {"paper": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "grid": "#d1d9e0", "bars": ("#1f6fb4", "#8fbfe6")},
    "-dark": {
        "paper": "#0d1117", "ink": "#f0f6fc", "faint": "#9198a1", "grid": "#3d444d", "bars": ("#4aa3ee", "#23618f"),
    },
}  # fmt: skip
BAR, GAP = 0.36, 0.04  # height of a bar and distance between the bars of a group, in groups


@dataclass(frozen=True)
class Comparison:
    """One bar of the plot.

    Args:
        task: a key of `TASKS`.
        cpu: name of the CPU, with its threads.
        ratio: the baseline's time (or memory) over icae_fast's.
        baseline, ours: both medians with their unit.
    """

    task: str
    cpu: str
    ratio: float
    baseline: str
    ours: str


def newest_results(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the newest results of each suite for each CPU: CPU name to suite to the file's content.

    Results that do not name their machine are left out.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for suite in SUITES:
        for path in sorted(folder.glob(f"{suite}-*.json")):
            result = json.loads(path.read_text())
            if "machine" not in result:
                continue
            machine = result["machine"]
            known = found.setdefault(machine["cpu"], {})
            if suite not in known or known[suite]["machine"]["date"] < machine["date"]:
                known[suite] = result
    return found


def comparisons(folder: Path = RESULTS) -> list[Comparison]:
    """Return all bars in the order of `TASKS`.

    Args:
        folder: holds the JSON files of the suites.
    """
    bars = []
    for suites in newest_results(folder).values():
        for result in suites.values():
            cpu = f"{_short(result['machine']['cpu'])}, {result['machine']['threads']} threads"
            for row in result["rows"]:
                bars += _bars(cpu, row)
    return sorted(bars, key=lambda bar: list(TASKS).index(bar.task))


def _short(cpu: str) -> str:
    return cpu.replace("(R)", "").removesuffix(" Processor")


def _bars(cpu: str, row: dict[str, Any]) -> Iterator[Comparison]:
    times = {name: value["median"] for name, value in row.get("seconds", {}).items()}
    over = row.get("speedup_over", {})
    if row.get("case") == COMPRESS_CASE and BASELINE in over:
        yield _timed("compress", cpu, over[BASELINE], times[BASELINE], times[OURS])
    elif "first_token_speedup" in row:
        for task, name in (("first token, slots", OURS), ("first token, KV", KV_TIER)):
            yield _timed(task, cpu, row["first_token_speedup"][name], times[BASELINE], times[name])
    elif "fraction_of_read" in row:
        steps = {name: value["median"] / 1e3 for name, value in row["step_ms"].items()}
        yield _timed("token", cpu, row["step_speedup_over"][GENERATE], steps[GENERATE], steps[OURS])
    elif "kv" in row:
        yield _timed("questions", cpu, over[ONE_BY_ONE], times[ONE_BY_ONE], times[OURS])
    elif "loss_of_first_half" in row:
        yield _timed("step", cpu, over[BASELINE], times[BASELINE], times[OURS])
        ours, baseline = (row["peak_bytes"][name] for name in (OURS, BASELINE))
        yield Comparison("memory", cpu, baseline / ours, f"{baseline / 1e9:.2g} GB", f"{ours / 1e9:.2g} GB")


def _timed(task: str, cpu: str, ratio: dict[str, float], baseline: float, ours: float) -> Comparison:
    return Comparison(task, cpu, ratio["median"], _seconds(baseline), _seconds(ours))


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value >= 0.1 else f"{value * 1e3:.2g} ms"


def draw_overview(bars: Sequence[Comparison], path: Path, suffix: str = ".svg") -> list[Path]:
    """Draw horizontal bars on a log axis, once for each theme.

    Args:
        bars: what `comparisons` returns.
        path: output path without a suffix; `NAME.svg` is for a light page, `NAME-dark.svg` for a dark one.
        suffix: output format, SVG by default.

    Returns:
        The files written.
    """
    written = []
    for name, theme in THEMES.items():
        # Text becomes outlines, so that the plot does not depend on the reader's fonts.
        with plt.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "path", "font.size": 11}):
            figure, axes = plt.subplots(figsize=(9, 6), facecolor=theme["paper"])
            figure.subplots_adjust(left=0.235, right=0.99, top=0.93, bottom=0.135)
            _draw_axes(axes, theme, max(bar.ratio for bar in bars))
            _draw_bars(axes, bars, theme)
            figure.text(0.012, 0.955, TITLE, color=theme["ink"], fontsize=13, weight="bold")
            for i, note in enumerate(NOTES):
                figure.text(0.012, 0.044 - 0.032 * i, note, color=theme["faint"], fontsize=9)
            written.append(path.with_name(f"{path.name}{name}{suffix}"))
            figure.savefig(written[-1], metadata={"Date": None} if suffix == ".svg" else None)
            plt.close(figure)
    return written


def _draw_axes(axes: Axes, theme: dict[str, Any], longest: float) -> None:
    axes.set_facecolor(theme["paper"])
    axes.set_yticks(range(len(TASKS)), list(TASKS.values()), color=theme["ink"])
    axes.set_ylim(len(TASKS) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlim(1, 4.5 * longest)
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(length=0, labelcolor=theme["ink"])
    axes.grid(True, axis="x", color=theme["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _draw_bars(axes: Axes, bars: Sequence[Comparison], theme: dict[str, Any]) -> None:
    cpus = list(dict.fromkeys(bar.cpu for bar in bars))
    for cpu, color in zip(cpus, theme["bars"], strict=False):
        own = [bar for bar in bars if bar.cpu == cpu]
        places = [_place(bar, bars) for bar in own]
        axes.barh(places, [bar.ratio - 1 for bar in own], BAR, left=1, color=color, label=cpu)
        for bar, y in zip(own, places, strict=True):
            ratio = f"{bar.ratio:.1f}x" if bar.ratio < 10 else f"{bar.ratio:.0f}x"
            style = {"xytext": (6, 0), "textcoords": "offset points", "va": "center_baseline"}
            axes.annotate(ratio, (bar.ratio, y), color=theme["ink"], weight="bold", **style, bbox=_cover(theme))
            axes.annotate(
                f"{bar.baseline} → {bar.ours}", (bar.ratio, y), color=theme["faint"], fontsize=9.5,
                bbox=_cover(theme), **style | {"xytext": (44, 0)},
            )  # fmt: skip
    axes.legend(
        loc="upper right", frameon=True, facecolor=theme["paper"], edgecolor="none", framealpha=1,
        labelcolor=theme["ink"],
    )  # fmt: skip


def _cover(theme: dict[str, Any]) -> dict[str, Any]:
    """Return a box that hides grid lines behind text."""
    return {"facecolor": theme["paper"], "edgecolor": "none", "pad": 1.5}


def _place(bar: Comparison, bars: Sequence[Comparison]) -> float:
    """Return the height of a bar: the bars of one task stand next to each other, centred on its label."""
    group = [other for other in bars if other.task == bar.task]
    return list(TASKS).index(bar.task) + (group.index(bar) - (len(group) - 1) / 2) * (BAR + GAP)
