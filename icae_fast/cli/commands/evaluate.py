"""`icae-fast eval`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table

from icae_fast.cli.loading import load, quieten_loading, refuse_memory_size
from icae_fast.cli.options import TextField, at_home, names
from icae_fast.cli.output import print_table, stderr
from icae_fast.errors import InvalidInputError, OutputError
from icae_fast.io.bundled import BUNDLED_NAME
from icae_fast.io.console import KEY_ENV, progress_bar
from icae_fast.io.packages import importing, install_command, require_extra

if TYPE_CHECKING:
    from icae_fast.training.evaluation.evaluate import Choice
    from icae_fast.training.evaluation.instructions.plan import Instructions
    from icae_fast.training.evaluation.result import Result
    from icae_fast.training.evaluation.subject import Subject, SubjectSpec
    from icae_fast.training.evaluation.texts.passages import Texts

CACHE_FILE = "answers.jsonl"
NO_JUDGE = "no judge is given: use --judge-endpoint and --judge-model, or --judge-local"


def eval_command(
    texts: Annotated[list[str] | None, typer.Argument(help="Held-out texts: .txt, .jsonl, .json or .parquet files, folders, globs.")] = None,  # noqa: E501
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables and plots. Answers that were computed before are reused from there.", callback=at_home)] = Path("evaluation"),  # noqa: E501
    adapter: Annotated[list[str] | None, typer.Option(help="PATH, NAME=PATH or NAME=PATH@MODEL: a folder, a shipped adapter or a hub id, and its base model; may be given several times.")] = None,  # noqa: E501
    model: Annotated[str, typer.Option(help="Base model of adapters without @MODEL. Default: the one that the adapter names.")] = BUNDLED_NAME,  # noqa: E501
    only: Annotated[str | None, typer.Option(help="Measurements, separated by commas: restoration, content, continuation, several_spans, instructions.")] = None,  # noqa: E501
    samples: Annotated[int, typer.Option(min=1, help="Passages per row of a table, and prompts of --pwc.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed for all random draws.")] = 0,
    memory_size: Annotated[int | None, typer.Option(help="Slots per span of an untrained adapter (default 128), which is measured then.")] = None,  # noqa: E501
    rate: Annotated[int | None, typer.Option(help="Context tokens per slot. With --adapter: replaces the adapters' rates. Without: of an untrained adapter (default 4).")] = None,  # noqa: E501
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    pwc: Annotated[list[str] | None, typer.Option(help='Rows with "input", "prompt" and "answer", .jsonl or .parquet; may be given several times.')] = None,  # noqa: E501
    contestants: Annotated[str, typer.Option(help="Sources that the prompts of --pwc are answered from, separated by commas.")] = "slots,full,truncated,summary",  # noqa: E501
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 128,
    judge_endpoint: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible API that compares answers.")] = None,  # noqa: E501
    judge_model: Annotated[str | None, typer.Option(help="The judge's name at the endpoint.")] = None,
    judge_key_env: Annotated[str, typer.Option(help="Environment variable with the endpoint's API key.")] = KEY_ENV,
    judge_body: Annotated[str | None, typer.Option(help="More fields of each request to the judge, as a JSON object; null removes a field.")] = None,  # noqa: E501
    judge_timeout: Annotated[float, typer.Option(min=0.001, help="Time limit of one request to the judge, in seconds.")] = 120.0,  # noqa: E501
    judge_retries: Annotated[int, typer.Option(min=0, help="Number of retries of a failed request to the judge.")] = 5,
    judge_jobs: Annotated[int, typer.Option(min=1, help="Concurrent requests to the judge.")] = 4,
    judge_local: Annotated[str | None, typer.Option(help="A local judge instead: a folder, a hub id, or smollm2.")] = None,  # noqa: E501
    text_field: TextField = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else on stdout.")] = False,  # noqa: E501
) -> None:  # fmt: skip
    """Measure adapters as the paper does.

    Tables, plots and JSON are written into a folder. Without --adapter, the shipped adapter for the model is measured,
    or an untrained one if there is none.

    After Ctrl-C or a failure of the judge, run the same command again: it continues where it stopped. Exit code 1: a
    requested measurement failed.
    """
    require_extra("eval", "evaluating")  # now, not after hours of computing
    with importing("evaluating", install_command("eval")):
        from icae_fast.training.evaluation.evaluate import INSTRUCTIONS, choose_groups
        from icae_fast.training.evaluation.instructions.contestants import known_reads
        from icae_fast.training.evaluation.instructions.plan import Instructions, load_judge
        from icae_fast.training.evaluation.instructions.questions import read_questions
        from icae_fast.training.evaluation.subject import parse_subject
        from icae_fast.training.evaluation.texts.passages import Texts
    choice = choose_groups(only, bool(texts), bool(pwc))
    specs = [parse_subject(text) for text in adapter or ()]
    if not pwc and (judge_endpoint or judge_model or judge_local):
        raise InvalidInputError("a judge compares answers to prompts; give rows of them with --pwc")
    read = Texts(texts or (), text_field)
    instructions = None
    if INSTRUCTIONS in choice.groups:
        questions, problems = read_questions(pwc or (), samples, seed)
        judge = load_judge(judge_endpoint, judge_model, judge_local, judge_key_env, judge_body, judge_jobs,
                           judge_timeout, judge_retries)  # fmt: skip
        instructions = Instructions(questions, problems, known_reads(names(contestants)), max_new_tokens, judge)
    _make_folder(output)
    subjects = _load_subjects(specs, model, memory_size, rate, dtype)
    results, not_measured = _measure(subjects, read, instructions, choice, output, samples, seed)
    _show(output, results, not_measured, choice.left_out, as_json)
    if not_measured or any(r.unfinished for r in results):
        raise typer.Exit(1)


def _measure(
    subjects: list[Subject],
    read: Texts,
    instructions: Instructions | None,
    choice: Choice,
    output: Path,
    samples: int,
    seed: int,
) -> tuple[list[Result], dict[str, str]]:
    """Return the results, and why the other measurements failed; `choice.left_out` is extended."""
    from icae_fast.training.evaluation.cache import AnswerCache
    from icae_fast.training.evaluation.evaluate import evaluate
    from icae_fast.training.evaluation.workbench import Workbench

    measurements = choice.of_texts
    if instructions is not None:
        instructions.check(subjects)
        measurements |= instructions.measurements()
        if instructions.judge is None:
            choice.left_out["instructions_judged"] = NO_JUDGE
    with AnswerCache(output / CACHE_FILE) as cache, _progress() as on_progress:
        if cache.damaged:
            stderr.print(f"note: {cache.damaged} damaged lines of {cache.path} will be computed again", style="yellow")
        bench = Workbench(read, cache, samples, seed, on_progress)
        try:
            return evaluate(subjects, bench, measurements, output, choice.left_out)
        except KeyboardInterrupt:
            stderr.print("interrupted; run the same command again to go on")
            raise


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {output} ({error.strerror}); give another output") from error


def _load_subjects(
    specs: list[SubjectSpec], model: str, memory_size: int | None, rate: int | None, dtype: str
) -> list[Subject]:
    from icae_fast.io.hub import default_adapter
    from icae_fast.training.evaluation.subject import Subject, load_subjects, parse_subject

    quieten_loading()
    if not specs and memory_size is None and rate is None and (default := default_adapter(model)):
        specs = [parse_subject(default[0])]
    if specs:
        refuse_memory_size(memory_size)
        return load_subjects(specs, None if model == BUNDLED_NAME else model, dtype, rate)
    return [Subject("untrained", load(None, model, memory_size, rate, dtype))]


def _show(
    output: Path, results: list[Result], not_measured: dict[str, str], left_out: dict[str, str], as_json: bool
) -> None:
    from icae_fast.training.evaluation.report import SUMMARY_FILE, result_values

    if as_json:
        values = [result_values(result) for result in results]
        print(json.dumps({"results": values, "not_measured": not_measured, "left_out": left_out}))
        return
    for result in results:
        print_table(_table(result))
    for name, reason in left_out.items():
        stderr.print(f"left out: {name}: {reason}")
    for name, reason in not_measured.items():
        stderr.print(f"not measured: {name}: {reason}", style="yellow")
    for result in results:
        if result.unfinished:
            stderr.print(f"not finished: {result.name}: {result.unfinished}", style="yellow")
    stderr.print(f"Tables, plots and their legend are in {output / SUMMARY_FILE}.")


def _table(result: Result) -> Table:
    from icae_fast.training.evaluation.report import cell

    names = result.headline or list(result.columns)
    shown = Table(*names, title=result.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for row in result.rows:
        shown.add_row(*(cell(row.get(name)) for name in names))
    return shown


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with progress_bar(stderr, *columns) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
