"""The command line, `icae-fast`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; see `icae_fast.cli.app.main`."""
    try:
        from icae_fast.cli import app

        app.main(argv)
    except KeyboardInterrupt:  # while modules are imported
        raise SystemExit(130) from None
