"""Regenerate the tables of Markdown pages: `python -m docs.tables README.md docs/*.md`.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`, on any page. The table of ops is generated from the op
specs and figures are read from docs/results, so no page can disagree with them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.kernels.tables import kernels_table, prediction_tables
from icae_fast.ops import REGISTRY, OpSpec

RESULTS = Path(__file__).parent / "results"
LINK = "results:"  # before the name of a file in docs/results; `fill` makes it a path relative to the page

# Device served by each backend. The reference serves a device without a compiled backend, and no dtype that one lacks.
DEVICES = {"reference": "any, without another backend", "cpp": "CPU", "triton": "CUDA", "cublas": "CUDA"}


def ops_table() -> str:
    """Return the ops with their backends, devices and dtypes, read from the specs."""
    lines = ["| op | backend | device | dtypes | gradient |", "| --- | --- | --- | --- | --- |"]
    for spec in REGISTRY.values():
        for backend, dtypes in spec.dtypes.items():
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            lines.append(
                f"| `{spec.name}` | {backend} | {DEVICES.get(backend, 'CUDA')} | {names} | {_gradient(spec)} |"
            )
    return "\n".join(lines)


def _gradient(spec: OpSpec) -> str:
    return ", ".join(f"`{n}`" for n in spec.differentiable) or "none"


def latency_tables() -> str:
    """Return a table for each `latency-*.json`, with the machine it was measured on."""
    return "\n\n".join(_latency(json.loads(p.read_text())) for p in sorted(RESULTS.glob("latency-*.json")))


def _latency(result: dict[str, Any]) -> str:
    machine = result["machine"]
    threads, isa, commit = machine["threads"], machine["isa"], machine["commit"]
    versions, sizes = machine["versions"], {k: result[k] for k in ("slots", "prompt_tokens", "new_tokens", "rounds")}
    lines = [
        f"{result['model']}, {result['dtype']}, {result['document_tokens']} tokens of text in {sizes['slots']} slots, "
        f"a prompt of {sizes['prompt_tokens']} and an answer of {sizes['new_tokens']} tokens; {machine['cpu']}, "
        f"{threads} threads, {isa}, torch {versions['torch']}, commit {commit[:8]}; medians of {sizes['rounds']} "
        "interleaved rounds:",
        "",
        "| | compress, s | first token, s | ms per token | total, s | peak above the weights, MB | times as fast as the baseline |",  # noqa: E501
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        keys = ("compress_s", "first_token_s", "per_token_ms", "total_s", "peak_mb")
        cells = ["-" if row[k] is None else f"{row[k]:.3g}" for k in keys]
        ratio = row["speedup_over_baseline"]
        cells.append(f"{ratio['median']:.3g} ({ratio['min']:.3g} to {ratio['max']:.3g})")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def encode_tables() -> str:
    """Return a table for each `encode-*.json`: speedups over the other encoders, and time over bare GEMMs."""
    return "\n\n".join(_encode(json.loads(p.read_text())) for p in sorted(RESULTS.glob("encode-*.json")))


def _encode(result: dict[str, Any]) -> str:
    lines = [
        f"Compressing, {result['machine']['cpu']}, {result['machine']['threads']} threads, {result['machine']['isa']}, "
        f"commit {result['machine']['commit'][:8]}; medians of ratios between neighbouring calls:",
        "",
        "| documents | over baseline | over compiled | over compiled frozen | time over GEMMs | of GEMM rate |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        over = row.get("speedup_over", {})
        if "baseline" in over:  # the other rows are those of attention and of growth
            ratios = [over.get(n) for n in ("baseline", "merged compiled", "merged compiled frozen")]
            cells = ["-" if r is None else f"{r['median']:.3g}" for r in (*ratios, row.get("time_over_gemms"))]
            rate = row["rates"]["icae_fast"]["fraction_of_bound"]
            lines.append(f"| {row['case']} | {' | '.join(cells)} | {rate:.0%} |")
    return "\n".join(lines)


def decode_tables() -> str:
    """Return a table for each `decode-*.json`: answering against transformers, the baseline and the bandwidth."""
    return "\n\n".join(_decode(json.loads(p.read_text())) for p in sorted(RESULTS.glob("decode-*.json")))


def _decode(result: dict[str, Any]) -> str:
    lines = [
        f"Answering, {result['machine']['cpu']}, {result['machine']['threads']} threads, {result['machine']['isa']}, "
        f"commit {result['machine']['commit'][:8]}; times are medians, and ratios medians of those between "
        "neighbouring calls:",
        "",
        "| | icae_fast | against | its time | times as fast |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        lines += [f"| {' | '.join(cells)} |" for cells in _decode_cells(row)]
    return "\n".join(lines)


def _decode_cells(row: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the table lines of one row: task, icae_fast's time, the rival, its time, and the ratio."""
    name = f"`{row['case']}`"
    if "fraction_of_read" in row:
        n = row["new_tokens"]
        yield _line(f"{name}, {n} tokens", row["seconds"], "generate", row["speedup_over"]["generate"])
        bound = f"reading {row['weight_bytes'] / 1e6:.0f} MB of weights at {row['read_gbs']:.3g} GB/s"
        times = row["step_ms"] | {bound: {"median": row["weight_bytes"] / row["read_gbs"] / 1e6}}
        yield _line(f"{name}, a token after the first", times, bound, row["fraction_of_read"], "ms")
    elif "step_speedup_over" in row:  # written by `bench.rivals.llama_cpp`
        for other, ratio in row["step_speedup_over"].items():
            yield _line(f"{name}, a token after the first", row["step_ms"], other, ratio, "ms")
    elif "kv" in row:
        yield from _question_cells(row, name)
    elif "first_token_speedup" in row:
        for provider, ratio in row["first_token_speedup"].items():
            tier = "KV" if provider.endswith("KV tier") else "slots"
            yield _line(f"{name}, first token, {tier} stored", row["seconds"], "baseline", ratio, ours=provider)


def _question_cells(row: dict[str, Any], name: str) -> Iterator[list[str]]:
    what = f"{name}, {row['prompts']} prompts, {row['new_tokens']} tokens for each, compressing included"
    for other, ratio in row["speedup_over"].items():
        cells = _line(what, row["seconds"], other, ratio)
        if other in row["scaled"]:
            cells[2] += f" ({row['scaled'][other]})"
        yield cells
    kv = row["kv"]
    rest = f"{kv['mb'] - kv['own_mb']:.3g} MB"
    what = f"{name}, {row['prompts']} prompts, keys and values but for the prompts' and answers' own"
    yield [what, rest, "one memory's slots", f"{kv['memory_mb']:.3g} MB", "-"]


def _line(
    what: str, times: dict[str, dict[str, float]], other: str, ratio: dict[str, float], unit: str = "s",
    ours: str = "icae_fast",
) -> list[str]:  # fmt: skip
    own, its = (f"{times[provider]['median']:.3g} {unit}" for provider in (ours, other))
    return [what, own, other, its, f"{ratio['median']:.3g}"]


def accuracy_tables() -> str:
    """Return a sentence for each `accuracy-*.json`: the distance of slots from the baseline's."""
    return "\n\n".join(_accuracy(json.loads(p.read_text())) for p in sorted(RESULTS.glob("accuracy-*.json")))


def _accuracy(result: dict[str, Any]) -> str:
    distances = [row["bf16_distance"] for row in result["rows"]]
    exact = max(row["fp32_rms_difference"] for row in result["rows"])
    low, high = min(distances), max(distances)
    return (
        f"Slots of SmolLM2 on {result['machine']['cpu']}, {result['machine']['isa']}: in fp32 within {exact:.1e} of "
        f"the baseline's (RMS); in bf16 {low:.2f} to {high:.2f} times as far from the baseline's as bf16 takes those "
        "from fp32."
    )


def slots_tables() -> str:
    """Return a table for each `quantized-slots-*.json`: restoration loss with quantised slots."""
    return "\n\n".join(_slots(json.loads(p.read_text())) for p in sorted(RESULTS.glob("quantized-slots-*.json")))


def _slots(result: dict[str, Any]) -> str:
    lines = [
        "Restoration loss of SmolLM2 in fp32, nats a token of held-out text, with the RMS error of the slots; "
        f"{result['machine']['cpu']}, commit {result['machine']['commit'][:8]}:",
        "",
        "| adapter | tokens into slots | fp32 slots | bf16 | int8 | slots of another text |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        loss, error = row["loss"], row["slot_error"]
        cells = [f"{loss['own']:.4f}", *(f"{loss[n]:.4f} ({error[n]:.2%})" for n in ("bfloat16", "int8"))]
        cells.append(f"{row['loss_from_others']:.4f}")
        lines.append(f"| {row['adapter']} | {row['tokens']} into {row['slots']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def train_tables() -> str:
    """Return a table for each `train-*.json`: a step, its memory by context length, and memorised passages."""
    paths = sorted(RESULTS.glob("train-*.json"))
    return "\n\n".join(_train(json.loads(p.read_text()), f"{LINK}{plot_name(p)}.svg") for p in paths)


def plot_name(results: Path) -> str:
    """Return the plot's file name for a `train-MACHINE.json`, without a suffix: `train-memory-MACHINE`."""
    return results.stem.replace("train-", "train-memory-", 1)


def _train(result: dict[str, Any], plot: str) -> str:
    lines = [
        f"Training, forward and backward of one document, {result['machine']['cpu']}, "
        f"{result['machine']['threads']} threads, {result['machine']['isa']}, commit "
        f"{result['machine']['commit'][:8]}; times are medians:",
        "",
        "| context | | s | tokens/s | peak above the weights, MB | over the baseline's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    said = []
    for row in result["rows"]:
        if "loss_of_first_half" in row:
            lines += _step_lines(row)
        elif "memory" in row:
            lines += _step_memory_lines(row)
            said += [_slopes(row), f"![Peak memory of a training step against its context]({plot})"]
        elif "overfit" in row:
            said.append(_overfit(row["overfit"]))
    return "\n\n".join(["\n".join(lines), *said])


def _step_lines(row: dict[str, Any]) -> Iterator[str]:
    for name, times in row["seconds"].items():
        peak = row["peak_bytes"][name] / 1e6
        rate, share = row["rates"][name]["tokens_per_s"], peak / (row["peak_bytes"]["baseline"] / 1e6)
        yield (
            f"| `{row['case']}`, {row['objective']} | {name} | {times['median']:.3g} | {rate:.3g} | {peak:.4g} | "
            f"{share:.2g} |"
        )


def _step_memory_lines(row: dict[str, Any]) -> Iterator[str]:
    for of_all in zip(*(found["points"] for found in row["memory"].values()), strict=True):
        by_name = dict(zip(row["memory"], of_all, strict=True))
        for name, point in by_name.items():
            seconds = point["seconds"]
            cells = ["-", "-"] if seconds is None else [f"{seconds:.3g}", f"{point['tokens'] / seconds:.3g}"]
            peak = f"{point['peak_mb']:.4g}" + " (extrapolated)" * point["extrapolated"]
            share = point["peak_mb"] / by_name["baseline"]["peak_mb"]
            what = f"{point['tokens']:,} tokens, {row['objective']} of {row['target_tokens']}"
            yield f"| {what} | {name} | {' | '.join(cells)} | {peak} | {share:.2g} |"


def _slopes(row: dict[str, Any]) -> str:
    ours, baseline = (row["memory"][name]["bytes_per_token"] for name in ("icae_fast", "baseline"))
    return (
        f"Each further context token adds {ours:,.0f} bytes to icae_fast's step and {baseline:,.0f} to the baseline's "
        "(slopes over the upper half of the measured lengths)."
    )


def _overfit(found: dict[str, Any]) -> str:
    return (
        f"A new adapter memorises {found['passages']} passages of {found['tokens']} tokens, {found['slots']} slots "
        f"each, in {found['warm_steps']} steps of the warm start and {found['steps']} of autoencoding "
        f"({found['seconds']:.0f} s in total): the loss is {found['loss']:.2g}, and {found['restored']} of "
        f"{found['passages']} come back exactly."
    )


def checkout_tables() -> str:
    """Return a table for each `checkout-*.json`: this code's times against those of an older commit."""
    return "\n\n".join(_checkout(json.loads(p.read_text())) for p in sorted(RESULTS.glob("checkout-*.json")))


def _checkout(result: dict[str, Any]) -> str:
    machine, commits = result["machine"], result["commits"]
    lines = [
        f"Commit {commits['this'][:8]} against {commits['other'][:8]}, SmolLM2 in bf16, {machine['cpu']}, "
        f"{machine['threads']} threads, {machine['isa']}; medians of {result['rounds']} rounds, with the extremes:",
        "",
        "| | times as fast | the older commit against itself, round by round |",
        "| --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = [f"{row[k]['median']:.3g} ({row[k]['min']:.3g} to {row[k]['max']:.3g})" for k in ("ratio", "noise")]
        lines.append(f"| {row['name'].replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "ops": ops_table, "latency": latency_tables, "encode": encode_tables, "decode": decode_tables,
    "accuracy": accuracy_tables, "slots": slots_tables, "train": train_tables,
    "checkout": checkout_tables, "kernels": kernels_table, "predictions": prediction_tables,
}  # fmt: skip


def fill(text: str, folder: Path) -> str:
    """Return a page with every marked table regenerated.

    Args:
        text: the page.
        folder: the page's folder, to which links to files in docs/results are relative.

    Raises:
        KeyError: a marker has an unknown name.
    """
    link = Path(os.path.relpath(RESULTS, folder.resolve())).as_posix()

    def table(marked: re.Match[str]) -> str:
        return f"{marked[1]}{TABLES[marked[2]]().replace(f']({LINK}', f']({link}/')}\n{marked[3]}"

    return re.sub(r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(fill(path.read_text(), path.parent))
