"""The readable report of `bench.gpu.check`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def report(result: dict[str, Any]) -> str:
    """Return all parts as Markdown."""
    machine, gpu = result["machine"], result["gpu"]
    on = (
        f"{gpu['name']}, sm {gpu['capability']}, {gpu['memory_gb']:.0f} GB, CUDA {gpu['cuda']}"
        if gpu
        else machine["cpu"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dirty = ", with uncommitted changes" if machine["dirty"] else ""
    failed = [name for name, part in result["parts"].items() if not part["ok"]]
    lines = [
        "# icae-fast on a GPU" if gpu else "# icae-fast: a trial of the GPU check on a CPU",
        "",
        f"{on}; {machine['date']}; commit {machine['commit']}{dirty}; {versions}.",
        "",
        f"**{len(failed)} of {len(result['parts'])} parts failed: {', '.join(failed)}.**"
        if failed
        else "All parts passed.",
    ]
    for name, part in result["parts"].items():
        lines += ["", f"## {name}: {'ok' if part['ok'] else 'FAILED'} ({part['seconds']:.1f} s)", "", *_part(part)]
    return "\n".join(lines) + "\n"


def _part(part: dict[str, Any]) -> Iterator[str]:
    if "error" in part:
        yield from ("```", part["error"].strip(), "```")
    for said in (*part.get("failures", ()), *part.get("notes", ())):
        yield f"* {said}"
    for text in part.get("tracebacks", {}).values():
        yield from ("", "```", text.strip(), "```")
    if part.get("failures") or part.get("notes"):
        yield ""
    for key in ("summary", "note"):
        if part.get(key):
            yield part[key]
    if part.get("output"):
        yield from ("```", *part["output"], "```")
    yield from _rows(part.get("rows", part.get("table", {}).get("rows", [])))


def _rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("rounds", "last_timings_ms")))
    if rows:
        yield f"| {' | '.join(name.replace('_', ' ') for name in names)} |"
        yield f"| {' | '.join('---' for _ in names)} |"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(name)) for name in names)} |"


def _cell(value: Any) -> str:
    if isinstance(value, dict) and {"median", "min", "max"} <= value.keys():
        return f"{value['median']:.3g} ({value['min']:.3g} to {value['max']:.3g})"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
