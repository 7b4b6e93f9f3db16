"""The command line, `icae-fast`."""

from icae_fast.cli.app import main

__all__ = ["main"]
