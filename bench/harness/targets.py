"""Performance targets of the suites: `python -m bench.harness.targets docs/results/{encode,decode,train}-MACHINE.json`.

Prints each measured figure next to its target, with "met" or "missed"; figures without a target are informative.
Targets are judged on medians. A missed target is not a failure.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.compare import OURS
from bench.harness.decoders import BY_PROMPT, GENERATE, KV_TIER, LLAMA_CPP, ONE_BY_ONE
from bench.harness.encoders import BASELINE, COMPILED, EXPANDED, FROZEN, MERGED, SDPA
from bench.harness.steps import ALL_KEPT, NOTHING_KEPT

WIDTH = 160  # wide enough that no line of the table breaks
AT_LEAST, AT_MOST = ">=", "<="


@dataclass(frozen=True)
class Target:
    """A bound for a figure.

    Args:
        sign: ">=" or "<=".
        plain, amx: the bound on a CPU without and with AMX. AMX makes products many times faster, so everything else
            takes a larger share of the time.
    """

    sign: str
    plain: float
    amx: float

    def bound(self, amx: bool) -> float:
        """Return the bound for a machine with or without AMX."""
        return self.amx if amx else self.plain

    def met(self, value: float, amx: bool) -> bool:
        """Return whether a value meets the bound."""
        return value >= self.bound(amx) if self.sign == AT_LEAST else value <= self.bound(amx)


# make bench-encode
OVER_BASELINE = Target(AT_LEAST, 2.2, 2.5)
OVER_COMPILED = Target(AT_LEAST, 1.5, 1.5)
OVER_GEMMS = Target(AT_MOST, 1.18, 1.5)
OVER_SDPA = Target(AT_LEAST, 4.0, 8.0)
EXPONENT = Target(AT_MOST, 1.03, 1.03)
LORA_COST_OVER_SHARE = Target(AT_MOST, 1.5, 1.5)
# make bench-decode
OVER_GENERATE = Target(AT_LEAST, 4.0, 4.0)
FRACTION_OF_READ = Target(AT_LEAST, 0.8, 0.8)
OVER_LLAMA_CPP = Target(AT_LEAST, 1.0, 1.0)
OVER_BY_PROMPT = Target(AT_LEAST, 20.0, 20.0)
OVER_ONE_BY_ONE = Target(AT_LEAST, 10.0, 10.0)
MEMORIES_HELD = Target(AT_MOST, 1.1, 1.1)  # one memory, and the template before its slots
FIRST_TOKEN_FROM_SLOTS = Target(AT_LEAST, 8.0, 8.0)
FIRST_TOKEN_FROM_KV = Target(AT_LEAST, 50.0, 50.0)
# make bench-train; peaks are memory above the weights, by context tokens where the target depends on them
STEP_OVER_BASELINE = Target(AT_LEAST, 2.0, 2.0)
STEP_PEAK = Target(AT_MOST, 1 / 4, 1 / 4)
PEAK_OVER_BASELINE = {8192: Target(AT_MOST, 1 / 8, 1 / 8)}
PEAK_GIB = {30720: Target(AT_MOST, 4.0, 4.0), 65536: Target(AT_MOST, 6.0, 6.0)}


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Args:
        where: name of the row.
        what: name of the figure.
        ratio: `median`, and if known `min`, `max` and `of_minima`.
        target: None for an informative figure.
    """

    where: str
    what: str
    ratio: dict[str, float]
    target: Target | None = None


def figures(row: dict[str, Any]) -> Iterator[Figure]:
    """Yield the figures of one row of a suite's results."""
    if "exponent" in row:
        yield from _growth_figures(row)
    elif SDPA in row.get("speedup_over", ()):
        yield from _attention_figures(row)
    elif "time_over_gemms" in row:
        yield from _encoder_figures(row)
    elif "fraction_of_read" in row:
        yield from _decode_figures(row)
    elif LLAMA_CPP in row.get("step_speedup_over", ()):
        over = row["step_speedup_over"][LLAMA_CPP]
        yield Figure(row["case"], f"a token after the first, over {LLAMA_CPP}", over, OVER_LLAMA_CPP)
    elif "kv" in row:
        yield from _question_figures(row)
    elif "first_token_speedup" in row:
        yield from _first_token_figures(row)
    elif "loss_of_first_half" in row:
        yield from _step_figures(row)
    elif "memory" in row:
        yield from _step_memory_figures(row)
    elif "overfit" in row:
        yield from _overfit_figures(row)


def _encoder_figures(row: dict[str, Any]) -> Iterator[Figure]:
    # Targets apply to the workload that runs all providers; other models and shapes are informative.
    judged = "lora_cost" in row
    for name, target in ((BASELINE, OVER_BASELINE), (MERGED, None), (COMPILED, OVER_COMPILED), (FROZEN, None)):
        if name in row["speedup_over"]:
            yield Figure(row["case"], f"over {name}", row["speedup_over"][name], target if judged else None)
    yield Figure(row["case"], "time over bare GEMMs", row["time_over_gemms"], OVER_GEMMS if judged else None)
    if judged:
        over_share = {name: cost / row["lora_flops_share"] for name, cost in row["lora_cost"].items()}
        what = f"LoRA's time over its share, {row['lora_flops_share']:.1%}"
        yield Figure(row["case"], what, over_share, LORA_COST_OVER_SHARE)


def _attention_figures(row: dict[str, Any]) -> Iterator[Figure]:
    best = min((SDPA, EXPANDED), key=lambda name: row["speedup_over"][name]["median"])
    judged = row["rows_by_tokens"].endswith("x640")  # a span of 512 tokens and its memory tokens
    yield Figure(
        f"attention {row['rows_by_tokens']}", f"over {best}", row["speedup_over"][best],
        OVER_SDPA if judged else None,
    )  # fmt: skip


def _growth_figures(row: dict[str, Any]) -> Iterator[Figure]:
    points = row["points"]
    yield Figure(f"1 to {points[-1]['spans']} spans", "exponent of time", {"median": row["exponent"]}, EXPONENT)
    most = max(point["working_mb"] for point in points[:-1])
    what = "working memory over fewer spans'"
    yield Figure(f"{points[-1]['spans']} spans", what, {"median": points[-1]["working_mb"] / most})


def _decode_figures(row: dict[str, Any]) -> Iterator[Figure]:
    where = f"{row['case']}, {row['new_tokens']} tokens"
    yield Figure(where, f"over {GENERATE}", row["speedup_over"][GENERATE], OVER_GENERATE)
    yield Figure(where, f"a token after the first, over {GENERATE}", row["step_speedup_over"][GENERATE])
    yield Figure(where, "bandwidth over that of a plain read", row["fraction_of_read"], FRACTION_OF_READ)
    yield Figure(where, "GB/s, plain read", {"median": row["read_gbs"]})
    yield Figure(where, "GB/s, of weights in decoding", {"median": row["step_gbs"]})


def _question_figures(row: dict[str, Any]) -> Iterator[Figure]:
    where = f"{row['case']}, {row['prompts']} prompts"
    for name, target in ((BY_PROMPT, OVER_BY_PROMPT), (ONE_BY_ONE, OVER_ONE_BY_ONE)):
        measured = row["prompts_measured"][name]
        note = f" (of {measured} prompts, scaled)" if name in row["scaled"] else ""
        yield Figure(where, f"over {name}{note}", row["speedup_over"][name], target)
    yield Figure(where, "memories whose KV is held", {"median": row["kv"]["memories"]}, MEMORIES_HELD)


def _first_token_figures(row: dict[str, Any]) -> Iterator[Figure]:
    for name, target in ((OURS, FIRST_TOKEN_FROM_SLOTS), (KV_TIER, FIRST_TOKEN_FROM_KV)):
        if name in row["first_token_speedup"]:
            what = f"first token of {name}, over {BASELINE}"
            yield Figure(row["case"], what, row["first_token_speedup"][name], target)


def _step_figures(row: dict[str, Any]) -> Iterator[Figure]:
    peaks = row["peak_bytes"]
    for name in (OURS, NOTHING_KEPT, ALL_KEPT):
        judged = name == OURS
        if judged:
            over = row["speedup_over"][BASELINE]
        else:  # the ratio of medians, since the results hold no single rounds
            over = {"median": row["seconds"][BASELINE]["median"] / row["seconds"][name]["median"]}
        yield Figure(row["case"], f"step of {name}, over {BASELINE}", over, STEP_OVER_BASELINE if judged else None)
        share = {"median": peaks[name] / peaks[BASELINE]}
        yield Figure(row["case"], f"peak of {name} over {BASELINE}'s", share, STEP_PEAK if judged else None)


def _step_memory_figures(row: dict[str, Any]) -> Iterator[Figure]:
    ours, baseline = (row["memory"][name] for name in (OURS, BASELINE))
    for own, its in zip(ours["points"], baseline["points"], strict=True):
        tokens, note = own["tokens"], ", extrapolated" if its["extrapolated"] else ""
        where = f"step of {tokens:,} tokens"
        if target := PEAK_OVER_BASELINE.get(tokens):
            yield Figure(where, f"peak over {BASELINE}'s{note}", {"median": own["peak_mb"] / its["peak_mb"]}, target)
        if target := PEAK_GIB.get(tokens):
            yield Figure(where, "peak, GiB", {"median": own["peak_mb"] * 1e6 / 2**30}, target)
    for name, found in ((OURS, ours), (BASELINE, baseline)):
        yield Figure(f"memory of {name}", "bytes a context token", {"median": found["bytes_per_token"]})


def _overfit_figures(row: dict[str, Any]) -> Iterator[Figure]:
    found = row["overfit"]
    where = f"{found['passages']} passages overfitted"
    if found["goal"] is None:
        return
    yield Figure(where, "loss", {"median": found["loss"]}, Target(AT_MOST, found["goal"], found["goal"]))
    all_of_them = Target(AT_LEAST, found["passages"], found["passages"])
    yield Figure(where, "restored exactly", {"median": found["restored"]}, all_of_them)
    yield Figure(where, "steps after the warm start", {"median": found["steps"]})
    yield Figure(where, "seconds", {"median": found["seconds"]})


def render(machine: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    """Return the table as text; empty if no row has a figure.

    Args:
        machine: result of `describe_machine`.
        rows: rows of a suite's results.
    """
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
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table)
    return text.getvalue()


def main(arguments: Sequence[str]) -> None:
    """Print the table of each results file named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.harness.targets", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="encode-, decode- or train-MACHINE.json")
    for path in parser.parse_args(arguments).results:
        result = json.loads(path.read_text())
        print(render(result["machine"], result["rows"]))


if __name__ == "__main__":
    main(sys.argv[1:])
