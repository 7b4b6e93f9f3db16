"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeVar

import typer

T = TypeVar("T")


def at_home(value: T) -> T:
    """Return paths with a leading `~` replaced by the home folder, for shells that leave it in `--option=~/x`.

    Args:
        value: value of an option: a path, several, or None. A name without `~` stays as it is.
    """
    if isinstance(value, (list, tuple)):
        return type(value)([at_home(v) for v in value])
    return type(value)(os.path.expanduser(str(value))) if isinstance(value, (str, Path)) else value


def names(text: str) -> tuple[str, ...]:
    """Return the distinct names in a list that is separated by commas."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def as_text(value: list[str] | None) -> list[str] | None:
    """Return texts of the command line.

    Raises:
        typer.BadParameter: one has bytes that are not UTF-8, which Python hands on as halves of surrogate pairs.
    """
    for text in value or ():
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise typer.BadParameter(f"{text!r} is not UTF-8; convert it")
    return value


_ADAPTER_HELP = (
    "Folder or hub id of a saved adapter, or the name of one that ships with the package. "
    "Default: the shipped adapter for the model, if there is one."
)
_MEMORY_SIZE_HELP = "Slots per span of an untrained adapter (default 128); not with --adapter."
_RATE_HELP = (
    "Context tokens per slot. Replaces the rate of --adapter; without it, the rate of an untrained adapter (default 4)."
)

Adapter = Annotated[str | None, typer.Option(help=_ADAPTER_HELP, callback=at_home)]
Model = Annotated[str, typer.Option(help="Base model: a path, a hub id, or the bundled SmolLM2.", callback=at_home)]
TextField = Annotated[str, typer.Option(help="Field or column of the texts, in files that have rows.")]
MemorySize = Annotated[int | None, typer.Option(help=_MEMORY_SIZE_HELP)]
Rate = Annotated[int | None, typer.Option(help=_RATE_HELP)]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else on stdout.")]
MemoryName = Annotated[
    str, typer.Argument(help="A memory file, - for one on stdin, or with --store a key.", callback=at_home)
]
Store = Annotated[str | None, typer.Option(help="Memory store that contains the memory.", callback=at_home)]
NewTokens = Annotated[int | None, typer.Option(min=1, help="Maximum number of tokens to write.")]
Temperature = Annotated[
    float | None, typer.Option(help="Sample at this temperature. Default, and at 0: greedy decoding.")
]
TopP = Annotated[float | None, typer.Option(help="Sample from the most likely tokens that add up to this probability.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Sample with this seed; the same seed repeats the answer.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.", callback=as_text)
]
