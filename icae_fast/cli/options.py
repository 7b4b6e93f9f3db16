"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

_ADAPTER_HELP = (
    "Folder or hub id of a saved adapter, or the name of one that ships with the package. "
    "Default: the shipped adapter for the model, if there is one."
)
_MEMORY_SIZE_HELP = "Slots per span of an untrained adapter (default 128); not with --adapter."
_RATE_HELP = (
    "Context tokens per slot. Replaces the rate of --adapter; without it, the rate of an untrained adapter (default 4)."
)

Adapter = Annotated[str | None, typer.Option(help=_ADAPTER_HELP)]
Model = Annotated[str, typer.Option(help="Base model: a path, a hub id, or the bundled SmolLM2.")]
MemorySize = Annotated[int | None, typer.Option(help=_MEMORY_SIZE_HELP)]
Rate = Annotated[int | None, typer.Option(help=_RATE_HELP)]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else on stdout.")]
MemoryName = Annotated[str, typer.Argument(help="A memory file, or with --store a key.")]
Store = Annotated[str | None, typer.Option(help="Memory store that contains the memory.")]
NewTokens = Annotated[int | None, typer.Option(min=1, help="Maximum number of tokens to write.")]
Temperature = Annotated[float | None, typer.Option(help="Sample at this temperature. Default: greedy decoding.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the most likely tokens that add up to this probability.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Sample with this seed; the same seed repeats the answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")]
