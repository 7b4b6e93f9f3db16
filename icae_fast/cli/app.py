"""Entry point of the command line: the table of commands, `--version`, and how errors are printed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
import typer.core
import typer.main

from icae_fast import __version__
from icae_fast.cli.ending import exit_code_of


class Command(NamedTuple):
    """A command that is not loaded yet.

    Args:
        module: in `icae_fast.cli.commands`.
        attribute: the function of the command, or a `typer.Typer` of subcommands.
        summary: its line in `icae-fast --help`, the first line of its docstring.
    """

    module: str
    attribute: str
    summary: str

    def load(self, name: str) -> Any:
        """Import the module and return the click command."""
        target = getattr(importlib.import_module(f"icae_fast.cli.commands.{self.module}"), self.attribute)
        if isinstance(target, typer.Typer):
            group = typer.main.get_command(target)
            group.name = name
            return group
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name)(target)
        return typer.main.get_command(single)


COMMANDS = {
    "compress": Command("compress", "compress", "Compress text files into memory files, or into a memory store."),
    "restore": Command("restore", "restore", "Write out the text of a memory."),
    "ask": Command("ask", "ask", "Answer questions about a memory."),
    "list": Command("list_store", "list_store", "List the memories of a store."),
    "info": Command(
        "info", "info", "Show versions, device, CPU features, instruction sets, and the backend of each op."
    ),
    "bench": Command("bench", "bench_app", "Run benchmarks against the baseline."),
    "pretrain": Command("train", "pretrain_command", "Train an adapter to restore and continue texts."),
    "finetune": Command("train", "finetune_command", "Train an adapter to answer prompts about contexts."),
    "make-pwc": Command("make_pwc", "make_pwc_command", "Make training triples (input, prompt, answer) from texts."),
    "eval": Command("evaluate", "eval_command", "Measure adapters as the paper does."),
}


class LazyGroup(typer.core.TyperGroup):
    """The group of all commands, which imports a command's module when that command is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # Placeholders: their names are listed and suggested after a typing error, and none is called.
        self.commands = {name: typer.core.TyperCommand(name=name, help=c.summary) for name, c in COMMANDS.items()}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a loaded command, or None if there is none of this name."""
        command = COMMANDS.get(cmd_name)
        return None if command is None else command.load(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


_HELP = {"help_option_names": ["-h", "--help"]}  # commands take it over from the group

app = typer.Typer(cls=LazyGroup, add_completion=True, rich_markup_mode=None, context_settings=_HELP)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"icae-fast {__version__}")
        raise typer.Exit


@app.callback()
def _icae_fast(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress long contexts into memory slots (ICAE)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is printed as one line on stderr, with exit code 2.

    Args:
        argv: arguments; None for those of the process.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = next(iter(arguments), "")
    sys.exit(exit_code_of(lambda: app(arguments or ["--help"], standalone_mode=False), command))


def main_of(command: str, argv: Sequence[str] | None = None) -> None:
    """Run one command from a module that has its own entry point.

    `accelerate launch -m icae_fast.training.pretrain` runs such a module.

    Args:
        command: a key of `COMMANDS`.
        argv: arguments after the command; None for those of the process.
    """
    main([command, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
