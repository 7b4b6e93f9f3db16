"""`icae-fast bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from icae_fast.cli.loading import load, read_text
from icae_fast.cli.options import Adapter, AsJson, Dtype, MemorySize, Model, Rate, at_home
from icae_fast.cli.output import print_table, stderr
from icae_fast.errors import InvalidInputError
from icae_fast.io.bundled import BUNDLED_NAME
from icae_fast.io.packages import require_extra

bench_app = typer.Typer(add_completion=False, rich_markup_mode=None)


@bench_app.callback()
def bench() -> None:
    """Run benchmarks against the baseline."""


@bench_app.command()
def latency(
    file: Annotated[Path, typer.Argument(help="A UTF-8 text, - for stdin.")],
    prompt: Annotated[str, typer.Option(help="Prompt about the text.")] = "Summarise the text in one sentence.",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds, of which medians are shown.")] = 3,
    adapter: Adapter = None, model: Model = BUNDLED_NAME, memory_size: MemorySize = None, rate: Rate = None,
    dtype: Dtype = "bfloat16", as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON, into a file or a folder (latency-MACHINE.json).", callback=at_home)] = None,  # noqa: E501
) -> None:  # fmt: skip
    """Time raw context, baseline ICAE, icae_fast cold, and icae_fast with a stored memory, in interleaved rounds."""
    require_extra("bench", "the benchmark")
    from icae_fast.benchmark.latency import latency_table, render
    from icae_fast.benchmark.machine import machine_slug
    from icae_fast.generation.prompts import own_prompt_ids
    from icae_fast.io.files import write_atomically

    text = read_text(file)
    if output is not None and not output.parent.is_dir():
        raise InvalidInputError(f"there is no folder {output.parent}; create it first")
    icae = load(adapter, model, memory_size, rate, dtype)
    document = icae.context_ids(text, str(file)).tolist()
    question = own_prompt_ids(icae, prompt)
    with stderr.status("timing"):
        result = latency_table(icae, document, question, new_tokens=new_tokens, rounds=rounds)
    if output is not None:
        if output.is_dir():
            output = output / f"latency-{machine_slug(result['machine'])}.json"
        write_atomically({output: (json.dumps(result, indent=1) + "\n").encode()})
    if as_json:
        print(json.dumps(result))
    else:
        print_table(render(result))
