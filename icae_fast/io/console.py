"""Console settings that commands share; importing this module is cheap."""

from __future__ import annotations

from rich.console import Console

KEY_ENV = "OPENAI_API_KEY"  # default environment variable for the API key of an endpoint


def stderr_console() -> Console:
    """Return a console for notes and progress on stderr; stdout is reserved for results."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
