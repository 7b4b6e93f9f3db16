"""Consoles that print data as it is; importing this module is cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

KEY_ENV = "OPENAI_API_KEY"  # default environment variable for the API key of an endpoint

# C0, DEL and C1 are written out: an escape in the name of a file would command the terminal.
_CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160))} | {9: "\\t", 10: "\\n", 13: "\\r"}


def printable(text: str, keep: str = "") -> str:
    """Return a text with its control characters written out.

    Args:
        text: such as the name of a file.
        keep: control characters that stay.
    """
    return text.translate({i: seen for i, seen in _CONTROLS.items() if chr(i) not in keep})


class DataConsole(Console):
    """A console that prints strings as they are: `[/x]` and `:smile:` may be names of files.

    Args:
        options: of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as `rich.text.Text`, its control characters but line ends written out."""
        return super().render_str(printable(text, keep="\n"), **options)


def stderr_console() -> Console:
    """Return a console for notes and progress on stderr; stdout is reserved for results."""
    return DataConsole(stderr=True, soft_wrap=True)


def progress_bar(console: Console, *columns: str | ProgressColumn) -> Progress:
    """Return a progress bar that disappears when it is done.

    Args:
        console: prints it.
        columns: columns; a text is a format of `rich.progress.TextColumn`, such as "{task.description}".
    """
    from rich.progress import Progress, TextColumn

    shown = (TextColumn(c, markup=False) if isinstance(c, str) else c for c in columns)
    return Progress(*shown, console=console, transient=True)
