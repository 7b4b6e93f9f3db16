"""The tables of docs/kernels.md about GPU kernels, made from docs/results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from bench.harness.compare import RESULTS

HEADINGS = ("kernel", "architecture", "registers", "spills, bytes", "shared memory, KB", "occupancy", "tensor cores")


def kernel_cells(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield a line for each kernel and architecture, with the worst figures over configurations and dtypes."""
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
    """Return the table of `docs/results/kernels.json`."""
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


def prediction_tables() -> str:
    """Return the tables of each `predicted-*.json`: the cost of a layer, and predicted times."""
    return "\n\n".join(_prediction(json.loads(p.read_text())) for p in sorted(RESULTS.glob("predicted-*.json")))


def _prediction(result: dict[str, Any]) -> str:
    setting = result["setting"]
    span = setting["tokens"] + setting["slots"]
    headings = ["op", "kernel", "launches", "requested, MB", "unique, MB", "GFLOP"]
    headings += [f"{gpu} limit, us" for gpu in result["gpus"]]
    lines = [
        f"**Predictions, not measurements.** One layer of {setting['model']} in 16 bits, {result['spans']} spans of "
        f"{span} tokens, LoRA rank {setting['rank']}, counted in Triton's interpreter with configurations for "
        f"sm_{setting['arch']}. *Requested* is what all blocks load and store, *unique* what must come from or go to "
        "memory; times are the larger one of operations and unique bytes over the GPU's published limits:",
        "",
        f"| {' | '.join(headings)} |",
        f"| {' | '.join('---' for _ in headings)} |",
        *_layer_lines(result),
        "",
        _unfused_sentence(result),
        "",
        *_grid_lines(result),
    ]
    return "\n".join(lines)


def _layer_lines(result: dict[str, Any]) -> Iterator[str]:
    for row in result["layer"]:
        unique = (row["read"] + row["written"]) / 1e6
        cells = [
            row["op"],
            f"`{row['kernel']}`",
            str(row["launches"]),
            f"{row['requested'] / 1e6:.1f}",
            f"{unique:.1f}",
        ]
        cells += [f"{row['flops'] / 1e9:.1f}", *(f"{row['limit_us'][g]:.3g}" for g in result["gpus"])]
        yield f"| {' | '.join(cells)} |"


def _unfused_sentence(result: dict[str, Any]) -> str:
    ours, theirs = result["layer"], result["unfused"]
    own_bytes = sum(row["read"] + row["written"] for row in ours) / 1e6
    n_bytes, launches = (sum(row[name] for row in theirs) for name in ("bytes", "launches"))
    return (
        f"Together {sum(row['launches'] for row in ours)} launches and {own_bytes:.0f} MB. The sequence that PEFT "
        f"makes of the layer, listed in `bench/kernels/unfused.py`, is {launches} launches and {n_bytes / 1e6:.0f} MB."
    )


def _grid_lines(result: dict[str, Any]) -> Iterator[str]:
    setting = result["assumptions"]
    products, bandwidth = (setting["reached"][name] for name in ("products", "bandwidth"))
    yield (
        f"Predicted seconds for the paper's grid, {setting['new_tokens']} new tokens, if {products:.0%} of the limit "
        f"of products and {bandwidth:.0%} of the bandwidth are reached (assumptions). The reference takes span "
        f"after span and document after document, a launch costing the host {setting['host_s']['torch'] * 1e6:.0f} us; "
        f"*in one batch* are the same launches of PEFT for all of them at once, padding not counted. Each cell is "
        f"compressing + answering:"
    )
    yield ""
    yield "| documents | GPU | icae_fast | reference | PEFT in one batch | measured in the ICAE paper |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in result["grid"]:
        cells = [f"{row['documents']}x{row['tokens']}", row["gpu"]]
        for prefix in ("", "reference_", "batched_"):
            pair = (row[f"{prefix}{part}_s"] for part in ("encode", "decode"))
            cells.append(" + ".join("-" if seconds is None else f"{seconds:.3g}" for seconds in pair))
        published = row["published_s"]
        cells.append(f"{published['encode']} + {published['decode']}, plain model {published['plain']}")
        yield f"| {' | '.join(cells)} |"
