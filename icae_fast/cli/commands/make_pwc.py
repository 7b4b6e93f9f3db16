"""`icae-fast make-pwc`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from icae_fast.cli.options import TextField, at_home, names
from icae_fast.cli.output import print_table, stderr
from icae_fast.errors import InvalidInputError
from icae_fast.io.console import KEY_ENV, progress_bar
from icae_fast.io.packages import importing, install_command

if TYPE_CHECKING:
    from icae_fast.training.chat import ChatModel
    from icae_fast.training.pwc import RecordFile, Report, Settings


def make_pwc_command(
    texts: Annotated[list[Path], typer.Argument(help="Texts: .txt, .jsonl, .json or .parquet files, or folders of them.", callback=at_home)],  # noqa: E501
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file; its records are not made again.", callback=at_home)],  # noqa: E501
    endpoint: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible API; usually ends in /v1.")] = None,  # noqa: E501
    model: Annotated[str | None, typer.Option(help="The model's name at the endpoint.")] = None,
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the endpoint's API key.")] = KEY_ENV,
    jobs: Annotated[int, typer.Option(min=1, help="Concurrent requests to the endpoint.")] = 4,
    timeout: Annotated[float, typer.Option(min=0.001, help="Time limit of one request, in seconds.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="Number of retries of a failed request.")] = 5,
    body: Annotated[str | None, typer.Option(help="More fields of each request, as a JSON object; null removes a field.")] = None,  # noqa: E501
    local: Annotated[str | None, typer.Option(help="A local model instead: a folder, a hub id, or smollm2.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers per batch of the local model.")] = 8,
    dtype: Annotated[str, typer.Option(help="Dtype of the local model: bfloat16 or float32.")] = "bfloat16",
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sampling temperature. Default: the endpoint's; greedy for a local model.")] = None,  # noqa: E501
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; a longer one is a failure.")] = 1024,
    kinds: Annotated[str | None, typer.Option(help="Prompts for every passage, separated by commas: restate, continue, rephrase, summary, title, keywords. Default: all; may be empty.")] = None,  # noqa: E501
    questions: Annotated[int, typer.Option(min=0, help="Prompts per passage that the teacher writes.")] = 10,
    at_once: Annotated[bool, typer.Option("--at-once", help="Request the prompts of --questions and their answers in one JSON reply: cheaper, for strong teachers.")] = False,  # noqa: E501
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest passage, in tokens of --tokenizer, else of the local model, else in words.")] = 512,  # noqa: E501
    min_tokens: Annotated[int, typer.Option(min=0, help="Shortest passage; shorter ones are skipped.")] = 16,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer that measures passages: a folder, a hub id, or smollm2.")] = None,  # noqa: E501
    text_field: TextField = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON and nothing else on stdout.")] = False,  # noqa: E501
) -> None:  # fmt: skip
    """Make training triples (input, prompt, answer) from texts.

    A teacher model reads each text in full. After a failure or Ctrl-C, run the same command again: it continues where
    it stopped. Exit code 1: some records are missing.
    """
    with importing("make-pwc", install_command("train")):
        from icae_fast.training.chat import EndpointModel
        from icae_fast.training.chat.options import api_key, check_names, load_local, request_fields
        from icae_fast.training.pwc import RecordFile, Settings

    check_names("teacher", "--", endpoint, model, local)
    chosen = Settings.kinds if kinds is None else names(kinds)
    settings = Settings(kinds=chosen, questions=questions, at_once=at_once, max_tokens=max_tokens,
                        min_tokens=min_tokens, text_field=text_field)  # fmt: skip
    if settings.needs_teacher and endpoint is None and local is None:
        raise InvalidInputError("these prompts need a teacher; give --endpoint and --model, or --local smollm2")
    with RecordFile(output) as records:
        if records.cut:
            stderr.print(f"note: removed a half-written last record of {records.cut} bytes", style="yellow")
        count = None if tokenizer is None else _counter(_load_tokenizer(tokenizer))
        teacher: ChatModel | None = None
        if endpoint is not None and model is not None:  # `check_names` requires both or none
            teacher = EndpointModel(
                endpoint, model, api_key=api_key(api_key_env), jobs=jobs, timeout=timeout, retries=retries,
                max_answer_tokens=max_answer_tokens, body=request_fields("--body", body, temperature),
            )  # fmt: skip
        elif local is not None:
            teacher = local_teacher = load_local(
                local, dtype, batch_size=batch_size, max_answer_tokens=max_answer_tokens, temperature=temperature
            )
            count = count or _counter(local_teacher.tokenizer)
        report = _make(texts, records, teacher, dataclasses.replace(settings, count=count or settings.count))
    _show(report, as_json)
    if report.failed or report.stopped:
        raise typer.Exit(1)


def _make(texts: list[Path], records: RecordFile, teacher: ChatModel | None, settings: Settings) -> Report:
    from icae_fast.training.pwc import make_pwc

    try:
        with _progress() as (on_progress, on_failure):
            return make_pwc(texts, records, teacher, settings, on_progress=on_progress, on_failure=on_failure)
    except KeyboardInterrupt:
        stderr.print(f"interrupted; {records.path} has {len(records.ids)} records; run the same command again to go on")
        raise


def _load_tokenizer(name: str) -> Any:
    from icae_fast.io.hub import load_tokenizer
    from icae_fast.training.chat.options import model_name

    return load_tokenizer(model_name(name), required=True)


def _counter(tokenizer: Any) -> Callable[[str], int]:
    from icae_fast.core.tokens import encode_text

    return lambda text: len(encode_text(tokenizer, text, "a passage", add_special_tokens=False))


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    columns = ("records", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with progress_bar(stderr, *columns) as progress:
        task = progress.add_task("records", total=None)
        yield (
            lambda done, total: progress.update(task, completed=done, total=total),
            lambda message: progress.console.print(f"failed: {message}", style="yellow"),
        )


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        table = Table("", "records")
        for kind, n in sorted(report.written.items()):
            table.add_row(f"written: {kind}", str(n))
        table.add_row("written", str(report.written.total()))
        table.add_row("there already", str(report.resumed))
        for cause, n in sorted(report.failed.items()):
            table.add_row(f"failed: {cause}", str(n))
        for cause, n in sorted(report.skipped.items()):
            table.add_row(f"passages left out: {cause}", str(n))
        for cause, n in sorted(report.retried.items()):
            table.add_row(f"requests tried again: {cause}", str(n))
        print_table(table)
    if report.stopped:
        stderr.print(f"stopped: {report.stopped}", style="red")
