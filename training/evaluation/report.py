"""Write results into a folder: a file for each table, plot and list of samples, and a summary."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icae_fast.errors import OutputError
from icae_fast.io.files import write_atomically
from icae_fast.training.evaluation.plots import draw
from icae_fast.training.evaluation.result import Result

SUMMARY_FILE = "summary.md"


def result_values(result: Result) -> dict[str, Any]:
    """Return a result without its samples as JSON values; non-finite numbers become None."""
    names = ("name", "title", "columns", "rows", "facts", "notes", "unfinished")
    return _finite({name: getattr(result, name) for name in names})


def write_result(folder: Path, result: Result, run: Mapping[str, Any]) -> None:
    """Write NAME.json, which holds the result, and NAME.png, NAME.svg and NAME.samples.jsonl, which are made from it.

    They are written all or none, but a kill may leave the files of an earlier run beside the new NAME.json.
    Files of an earlier run that this result does not have are deleted.

    Args:
        folder: existing output folder.
        result: the result.
        run: JSON values that all results of a run share; see `icae_fast.training.evaluation.evaluate.describe_run`.

    Raises:
        OutputError: a file cannot be written.
    """
    lines = [json.dumps(_finite(sample), ensure_ascii=False) + "\n" for sample in result.samples]
    values = result_values(result) | {"run": dict(run)}
    files = {".json": (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode(), **draw(result)}
    if lines:
        files[".samples.jsonl"] = "".join(lines).encode()
    _write({folder / (result.name + suffix): data for suffix, data in files.items()})
    for suffix in {".samples.jsonl", ".png", ".svg"} - set(files):
        (folder / (result.name + suffix)).unlink(missing_ok=True)


def write_summary(
    folder: Path, results: Sequence[Result], not_measured: Mapping[str, str], run: Mapping[str, Any]
) -> Path:
    """Write `summary.md` with every table and its plots, and the measurements that could not be made.

    Args:
        folder: existing folder with the results' files.
        results: results in the order of the summary.
        not_measured: reasons by measurement.
        run: see `write_result`.

    Returns:
        The file's path.

    Raises:
        OutputError: the file cannot be written.
    """
    parts = ["# Evaluation", _subjects(run), _settings(run)]
    for result in results:
        parts += _section(folder, result)
    if not_measured:
        parts += ["## Not measured", "\n".join(f"* {name}: {reason}" for name, reason in not_measured.items())]
    path = folder / SUMMARY_FILE
    _write({path: ("\n\n".join(part for part in parts if part) + "\n").encode()})
    return path


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table; missing cells and None become dashes."""
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    lines += [f"| {' | '.join(_escaped(cell(row.get(name))) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def _section(folder: Path, result: Result) -> list[str]:
    meanings = "\n".join(f"* `{name}`: {meaning}" for name, meaning in result.columns.items())
    legend = f"<details><summary>Columns</summary>\n\n{meanings}\n\n</details>"
    skipped = result.facts.get("skipped") or ()
    left_out = "Left out:\n\n" + "\n".join(f"* {reason}" for reason in skipped) if skipped else ""
    image = f"![{result.title}]({result.name}.png)" if (folder / f"{result.name}.png").exists() else ""
    title = f"## {result.title}"
    figures = table(list(result.columns), result.rows)
    return [title, figures, legend, image, *result.notes, result.unfinished, left_out, result.text]


def _subjects(run: Mapping[str, Any]) -> str:
    rows = []
    for subject in run["subjects"]:
        config = subject["config"]
        rows.append(
            {"subject": subject["name"], "adapter": subject["adapter"], "base": config["base_model"]}
            | {name: config[name] for name in ("memory_size", "compression_rate", "lora_rank", "memory_positions")}
            | {"dtype": subject["dtype"]}
        )
    return table(list(rows[0]), rows)


def _settings(run: Mapping[str, Any]) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = f", commit {machine['commit'][:8]}" if machine["commit"] else ""
    bad = ", ".join(f"{n} times {cause}" for cause, n in run["bad_rows"].items())
    return (
        f"At most {run['samples']} passages or prompts per row, seed {run['seed']}, {run['documents']} texts"
        f"{f' (left out: {bad})' if bad else ''}; {machine['cpu']}, {machine['device']}; {versions}{commit}."
    )


def cell(value: Any) -> str:
    """Return a cell as text: floats with at most four digits and four decimals, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{round(value, 4):.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _finite(value: Any) -> Any:
    """Return JSON values with None for non-finite numbers, which JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _write(files: Mapping[Path, bytes]) -> None:
    try:
        write_atomically(files)
    except OSError as error:
        folder = next(iter(files)).parent
        raise OutputError(f"cannot write to {folder} ({error.strerror}); make room or use another folder") from error
