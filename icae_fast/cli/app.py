"""The command line, `icae-fast`."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from icae_fast.cli.evaluate import eval_command
from icae_fast.cli.make_pwc import make_pwc_command
from icae_fast.cli.train import finetune_command, pretrain_command
from icae_fast.errors import ICAEError, InvalidInputError
from icae_fast.io.bundled import EMBEDDED_NAME

MEMORY_SUFFIX = ".icae"
UNTRAINED = (
    "note: this adapter is untrained: the pipeline is the real one, but what comes out of the "
    "memory is not yet what went in. Pass --adapter for a trained one."
)

# Typer brings its own click, and this is the one name by which it gives the base class of usage errors away.
_USAGE_ERROR = typer.BadParameter.__mro__[1]

app = typer.Typer(help="Compress long contexts into memory slots (ICAE).", add_completion=False, rich_markup_mode=None)
bench_app = typer.Typer(help="Benchmarks against the baseline.")
app.add_typer(bench_app, name="bench")
stderr = Console(stderr=True, soft_wrap=True)

_ADAPTER_HELP = (
    "Folder or hub id of a saved adapter, or the name of one that comes with the package; by default the one for the "
    "model, if there is one."
)
Adapter = Annotated[str | None, typer.Option(help=_ADAPTER_HELP)]
Model = Annotated[str, typer.Option(help="Base model: a path, a hub id, or the embedded SmolLM2.")]
_MEMORY_SIZE_HELP = "Slots a span: gives an untrained adapter, by default of 128; not with --adapter."
MemorySize = Annotated[int | None, typer.Option(help=_MEMORY_SIZE_HELP)]
_RATE_HELP = (
    "Context tokens a slot, in place of the adapter's own; without --adapter, gives an untrained one, by default of 4."
)
Rate = Annotated[int | None, typer.Option(help=_RATE_HELP)]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else on stdout.")]
MemoryName = Annotated[str, typer.Argument(help="A memory file, or with --store a key.")]
Store = Annotated[str | None, typer.Option(help="The memory store that the memory is in.")]
NewTokens = Annotated[int | None, typer.Option(min=1, help="The most tokens to write.")]
Temperature = Annotated[
    float | None, typer.Option(help="Sample at this temperature; without, the likeliest tokens come.")
]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that add up to this probability.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Sample, the same in every call with this seed.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2.

    Args:
        argv: arguments, by default the process's own.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        sys.exit(app(arguments or ["--help"], standalone_mode=False) or 0)
    except (ICAEError, _USAGE_ERROR) as error:
        text = error if isinstance(error, ICAEError) else f"{error.format_message()} (try --help)"
        stderr.print(f"icae-fast: error: {text}", style="red", highlight=False, markup=False)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)


def main_of(command: str, argv: Sequence[str] | None = None) -> None:
    """`main` of one command, for modules that are run by themselves (`accelerate launch -m
    icae_fast.training.pretrain`)."""
    main([command, *(sys.argv[1:] if argv is None else argv)])


def load(adapter: str | None, model: str, memory_size: int | None, rate: int | None, dtype: str) -> Any:
    """The ICAE that the options ask for.

    Without an adapter and sizes, that is the one that comes with the package for this model; without an adapter, an
    untrained one of these sizes, the same in every call.
    """
    import torch

    from icae_fast import ICAE, ICAEConfig
    from icae_fast.io.hub import default_adapter, load_base_model, parse_dtype

    quieten_loading()
    torch_dtype = parse_dtype(dtype)
    if adapter is None and memory_size is None and rate is None and (default := default_adapter(model)):
        adapter = default[0]
    if adapter is not None:
        refuse_memory_size(memory_size)
        base = None if model == EMBEDDED_NAME else model
        return ICAE.from_pretrained(adapter, base_model=base, dtype=torch_dtype, compression_rate=rate)
    stderr.print(UNTRAINED, style="yellow")
    base, tokenizer = load_base_model(model, ICAEConfig(), torch_dtype)
    torch.manual_seed(0)
    sizes = {"memory_size": memory_size, "compression_rate": rate}
    config = ICAEConfig(**{name: value for name, value in sizes.items() if value is not None})
    return ICAE.from_base(base, config, tokenizer).eval()


def refuse_memory_size(memory_size: int | None) -> None:
    """Raise where a number of slots is given beside a saved adapter."""
    if memory_size is not None:
        raise InvalidInputError("--memory-size is for untrained adapters; a saved one has its own: leave it out")


def quieten_loading() -> None:
    """Have transformers load models without progress bars, and without a warning about PEFT that helps no user."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def read_text(path: Path) -> str:
    """A UTF-8 text file's content."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read {path} as UTF-8 text ({error}); check the path") from error


def load_memory_for(
    memory: str, store: str | None, adapter: str | None, model: str, dtype: str, *, kv: bool = False
) -> tuple[Any, Any]:
    """The ICAE that made a memory, and the memory: a file, or a key in a store, with `kv` as in `MemoryStore.get`."""
    from icae_fast import MemoryStore
    from icae_fast.io.checkpoints import read_header
    from icae_fast.io.hub import default_adapter, resolve_adapter_folder
    from icae_fast.store.memory_file import load_memory, read_memory_header

    if store is None:
        header = read_memory_header(memory)[1]
    else:
        with MemoryStore(store, create=False) as opened:
            header = opened.header(memory)
    memory_size, rate = header["config"]["memory_size"], header["config"]["compression_rate"]
    default = default_adapter(model)
    if adapter is None and default is not None:
        shipped = read_header(resolve_adapter_folder(default[0]))[1]
        adapter = default[0] if shipped["adapter_hash"] == header["adapter_hash"] else None
    icae = load(adapter, model, None if adapter else memory_size, rate, dtype)
    if store is None:
        return icae, load_memory(memory, icae)
    with MemoryStore(store, icae, create=False) as opened:
        return icae, opened.get(memory, kv=kv)


def describe(memory: Any) -> dict[str, Any]:
    """A memory's figures as JSON values."""
    return {
        "tokens": memory.n_source_tokens,
        "spans": list(memory.span_lengths),
        "slots": memory.n_slots,
        "ratio": round(memory.compression_ratio, 3),
        "bytes": memory.nbytes,
    }


@app.command()
def compress(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text files.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the memories.")] = None,
    store: Annotated[str | None, typer.Option(help="Memory store to put them into; texts that it holds are not compressed again.")] = None,  # noqa: E501
    kv: Annotated[bool, typer.Option("--kv", help="Keep keys and values in the store, too, so that `ask` reads no slot.")] = False,  # noqa: E501
    adapter: Adapter = None, model: Model = EMBEDDED_NAME, memory_size: MemorySize = None, rate: Rate = None,
    dtype: Dtype = "bfloat16", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compress text files, all in one batch, into memory files (FILE.icae) beside them or in a folder, or a store."""
    texts = [read_text(path) for path in files]
    targets = [(output or path.parent) / (path.name + MEMORY_SUFFIX) for path in files]
    if output is not None and store is not None:
        raise InvalidInputError("--output and --store say two places; give one of them")
    if kv and store is None:
        raise InvalidInputError("--kv is for stores, and a memory file holds slots alone; give --store")
    if store is None and len(set(targets)) < len(targets):
        raise InvalidInputError("two files would write the same memory; give them different names or compress apart")
    if output is not None and not output.is_dir():
        raise InvalidInputError(f"{output} is no folder; make it first")
    icae = load(adapter, model, memory_size, rate, dtype)
    rows = _compress_into_store(texts, store, icae, kv) if store else _compress_into_files(texts, targets, icae)
    if as_json:
        print(json.dumps(rows))
    else:
        Console().print(_memory_table("key" if store else "memory file", rows))


def _compress_into_files(texts: list[str], targets: list[Path], icae: Any) -> list[dict[str, Any]]:
    from icae_fast.store.memory_file import save_memory

    with _compressing() as on_progress:
        memories = icae.compress(texts, on_progress=on_progress)
    for target, memory in zip(targets, memories, strict=True):
        save_memory(target, memory, icae)
    return [{"memory": str(t)} | describe(m) for t, m in zip(targets, memories, strict=True)]


def _compress_into_store(texts: list[str], path: str, icae: Any, kv: bool) -> list[dict[str, Any]]:
    from icae_fast import MemoryStore

    with MemoryStore(path, icae) as store, _compressing() as on_progress:
        memories = store.compress(texts, kv=kv, on_progress=on_progress)
        keys = [store.key_of(text) for text in texts]
    return [{"memory": key} | describe(memory) for key, memory in zip(keys, memories, strict=True)]


@contextlib.contextmanager
def _compressing() -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("compressing"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"))
    with Progress(*columns, TimeElapsedColumn(), console=stderr, transient=True) as progress:
        task = progress.add_task("compressing", total=None)
        yield lambda n, of: progress.update(task, completed=n, total=of)


def _memory_table(first: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(first, "tokens", "spans", "slots", "ratio", "KiB")
    for row in rows:
        table.add_row(
            row["memory"], str(row["tokens"]), str(len(row["spans"])), str(row["slots"]), f"{row['ratio']:.2f}",
            f"{row['bytes'] / 1024:.0f}",
        )  # fmt: skip
    return table


@app.command()
def restore(
    memory: MemoryName,
    by_span: Annotated[bool, typer.Option("--by-span", help="Restore each span from its own slots, for texts of more spans than the adapter was trained with.")] = False,  # noqa: E501
    max_new_tokens: NewTokens = None, store: Store = None, adapter: Adapter = None, model: Model = EMBEDDED_NAME,
    dtype: Dtype = "bfloat16", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write out the text that a memory holds."""
    icae, loaded = load_memory_for(memory, store, adapter, model, dtype)
    if by_span:  # the limit is of each span
        text = icae.restore_by_span(loaded, max_new_tokens=max_new_tokens)
        if not as_json:
            print(text)
    else:
        text = icae.restore(loaded, max_new_tokens=max_new_tokens, streamer=None if as_json else _streamer(icae))
    if as_json:
        print(json.dumps({"memory": memory, "text": text} | describe(loaded)))


@app.command()
def ask(
    memory: MemoryName,
    prompts: Annotated[list[str], typer.Argument(help="Questions or instructions.")],
    max_new_tokens: NewTokens = 128, temperature: Temperature = None, top_p: TopP = None, seed: Seed = None,
    stop: Stop = None, store: Store = None, adapter: Adapter = None, model: Model = EMBEDDED_NAME,
    dtype: Dtype = "bfloat16", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Answer questions about a memory; several are answered in one batch."""
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    options = {name: value for name, value in sampling.items() if value is not None}
    options |= {"do_sample": bool(options), "stop_strings": stop or (), "max_new_tokens": max_new_tokens or 128}
    icae, loaded = load_memory_for(memory, store, adapter, model, dtype, kv=True)
    if len(prompts) == 1 and not as_json:
        for piece in icae.stream(loaded, prompts, **options):
            print(piece.text, end="", flush=True)
        print()
        return
    answers = icae.answer(loaded, prompts, **options)
    if as_json:
        rows = [
            {"prompt": p, "answer": a.text, "finish_reason": a.finish_reason}
            for p, a in zip(prompts, answers, strict=True)
        ]
        print(json.dumps({"memory": memory, "answers": rows}))
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"> {prompt}\n{answer.text}\n")


def _streamer(icae: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(icae.tokenizer, skip_special_tokens=True)


@app.command("list")
def list_store(
    store: Annotated[str, typer.Argument(help="A memory store: a folder, or an fsspec address.")],
    as_json: AsJson = False,
) -> None:
    """List the memories of a store."""
    from icae_fast import MemoryStore

    with MemoryStore(store, create=False) as opened:
        rows = [{"memory": key} | describe(opened.get(key)) for key in opened.keys()]  # noqa: SIM118
    if as_json:
        print(json.dumps(rows))
    else:
        Console().print(_memory_table("key", rows))


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, device, CPU features, instruction sets, and which backend serves each op."""
    from icae_fast.info import collect_info

    facts = collect_info()
    if as_json:
        print(json.dumps(facts))
        return
    console = Console()
    table = Table("", "", show_header=False)
    for name, version in facts["versions"].items():
        table.add_row(name, version or "not installed")
    cpu = facts["cpu"]
    table.add_section()
    table.add_row("device", facts["device"])
    table.add_row("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads")
    table.add_row("C++ kernels", facts["extension"])
    if cpu["isa"]:
        table.add_row("instruction set", cpu["isa"])
        table.add_row("sets in this build", ", ".join(cpu["build"]["isas"]))
        table.add_row("sets this CPU runs", ", ".join(cpu["runnable_isas"]))
        table.add_row("CPU features", ", ".join(cpu["features"]))
    console.print(table)
    ops = Table("op", "cpu", "cuda")
    for name, by_device in facts["ops"].items():
        ops.add_row(name, by_device["cpu"], by_device["cuda"])
    console.print(ops)


@bench_app.command()
def latency(
    file: Annotated[Path, typer.Argument(help="A UTF-8 text to read.")],
    prompt: Annotated[str, typer.Option(help="What is asked about it.")] = "Summarise the text in one sentence.",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are shown.")] = 3,
    adapter: Adapter = None, model: Model = EMBEDDED_NAME, memory_size: MemorySize = None, rate: Rate = None,
    dtype: Dtype = "bfloat16", as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON, into a file or a folder (latency-MACHINE.json).")] = None,  # noqa: E501
) -> None:  # fmt: skip
    """Raw context, baseline ICAE, icae_fast cold, and icae_fast with a stored memory, in interleaved rounds."""
    from icae_fast.io.files import write_atomically

    try:
        from icae_fast.benchmark.latency import latency_table, render
        from icae_fast.benchmark.machine import machine_slug
    except ImportError as error:
        raise InvalidInputError(
            f"the benchmarks need more packages ({error}); pip install 'icae-fast[bench]'"
        ) from error
    text = read_text(file)
    if output is not None and not output.parent.is_dir():
        raise InvalidInputError(f"{output.parent} is no folder; make it first")
    icae = load(adapter, model, memory_size, rate, dtype)
    document = icae.tokenizer(text)["input_ids"]
    question = icae.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with stderr.status("timing"):
        result = latency_table(icae, document, question, new_tokens=new_tokens, rounds=rounds)
    if output is not None:
        if output.is_dir():
            output = output / f"latency-{machine_slug(result['machine'])}.json"
        write_atomically({output: (json.dumps(result, indent=1) + "\n").encode()})
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(render(result))


app.command("pretrain")(pretrain_command)
app.command("finetune")(finetune_command)
app.command("make-pwc")(make_pwc_command)
app.command("eval")(eval_command)


if __name__ == "__main__":
    main()
