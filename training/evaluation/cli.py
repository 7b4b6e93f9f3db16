"""`icae-fast eval`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from icae_fast.embedded import EMBEDDED_NAME
from icae_fast.errors import InvalidInputError, OutputError

_PACKAGES = ("sacrebleu", "matplotlib")  # of the extra `eval`; looked for before hours are spent
CACHE_FILE = "answers.jsonl"


def eval_command(
    texts: Annotated[list[str], typer.Argument(help="Held-out texts: .txt, .jsonl or .parquet files, folders, globs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables and plots; what was computed before is kept there.")] = Path("evaluation"),  # noqa: E501
    adapter: Annotated[list[str] | None, typer.Option(help="PATH, NAME=PATH or NAME=PATH@MODEL: a folder or hub id, and its base model; may be given several times.")] = None,  # noqa: E501
    model: Annotated[str, typer.Option(help="Base model of adapters without @MODEL; by default the one that they name.")] = EMBEDDED_NAME,  # noqa: E501
    only: Annotated[str | None, typer.Option(help="Measurements, separated by commas: restoration, content, continuation, several_spans.")] = None,  # noqa: E501
    samples: Annotated[int, typer.Option(min=1, help="Passages for each row of a table.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    memory_size: Annotated[int, typer.Option(help="Slots a span, for an untrained adapter.")] = 128,
    rate: Annotated[int, typer.Option(help="Context tokens a slot, for an untrained adapter.")] = 4,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else on stdout.")] = False,  # noqa: E501
) -> None:  # fmt: skip
    """Measure adapters as the paper does, and write tables, plots and JSON; without --adapter an untrained one.

    Run the same command again after Ctrl-C: it goes on where it was. Exit code 1: something could not be measured.
    """
    try:
        from training.evaluation.cache import AnswerCache
        from training.evaluation.measures import optional_package
        from training.evaluation.passages import Texts
        from training.evaluation.run import choose_measurements, evaluate
        from training.evaluation.subject import parse_subject
        from training.evaluation.workbench import Workbench
    except ImportError as error:
        raise InvalidInputError(f"evaluating needs more packages ({error}); pip install 'icae-fast[eval]'") from error
    measurements = choose_measurements(only)
    for package in _PACKAGES:
        optional_package(package)
    specs = [parse_subject(text) for text in adapter or ()]
    read = Texts(texts)
    _make_folder(output)
    subjects = _load_subjects(specs, model, memory_size, rate, dtype)
    with AnswerCache(output / CACHE_FILE) as cache, _progress() as on_progress:
        bench = Workbench(read, cache, samples, seed, on_progress)
        try:
            results, not_measured = evaluate(subjects, bench, measurements, output)
        except KeyboardInterrupt:
            _stderr().print("interrupted; run the same command again to go on")
            raise
    _show(output, results, not_measured, as_json)
    if not_measured:
        raise typer.Exit(1)


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {output} ({error.strerror}); give another output") from error


def _load_subjects(specs: list[Any], model: str, memory_size: int, rate: int, dtype: str) -> list[Any]:
    from icae_fast.cli import load, quieten_loading
    from training.evaluation.subject import Subject, load_subjects

    quieten_loading()
    if specs:
        return load_subjects(specs, None if model == EMBEDDED_NAME else model, dtype)
    return [Subject("untrained", load(None, model, memory_size, rate, dtype))]


def _show(output: Path, results: list[Any], not_measured: dict[str, str], as_json: bool) -> None:
    from training.evaluation.report import SUMMARY_FILE, result_values

    if as_json:
        print(json.dumps({"results": [result_values(r) for r in results], "not_measured": not_measured}))
        return
    console = Console()
    for result in results:
        console.print(_table(result))
    for name, reason in not_measured.items():
        _stderr().print(f"not measured: {name}: {reason}", style="yellow")
    console.print(f"Tables, plots and their legend are in {output / SUMMARY_FILE}.", soft_wrap=True, highlight=False)


def _table(result: Any) -> Table:
    from training.evaluation.report import cell

    names = result.headline or list(result.columns)
    shown = Table(*names, title=result.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for row in result.rows:
        shown.add_row(*(cell(row.get(name)) for name in names))
    return shown


def _stderr() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_stderr(), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
