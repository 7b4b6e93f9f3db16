"""Command line and result file of the measurements in this folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.compare import write_results
from icae_fast.benchmark.machine import describe_machine


def read_text(module: str, description: str | None, arguments: Sequence[str]) -> str:
    """Return the text of the file that the command line names.

    Args:
        module: name of the module that is run, for `--help`.
        description: what it measures, for `--help`.
        arguments: the command line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("text", type=Path, help="a UTF-8 text file, e.g. examples/harrow_point.txt")
    path = parser.parse_args(arguments).text
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{path} cannot be read: {error}")


def publish(suite: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to docs/results and print them.

    Args:
        suite: name of the suite.
        rows: JSON values, rounded.
    """
    write_results(suite, describe_machine(), rows)
    for row in rows:
        print(row)
