"""What the commands of `training` have in common, without importing anything heavy."""

from __future__ import annotations

from rich.console import Console

KEY_ENV = "OPENAI_API_KEY"  # where the API key of an endpoint is looked for


def stderr_console() -> Console:
    """A console for notes and progress: stdout is for results."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
