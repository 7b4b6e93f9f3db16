"""Fuzz one target with atheris in this process: `python -m fuzz.one TARGET FOLDER [libFuzzer options]`."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["icae_fast"]):
    from fuzz import targets
    from icae_fast.training.data import records
    from icae_fast.training.evaluation import cache
    from icae_fast.training.evaluation.instructions import verdicts
    from icae_fast.training.loop import checkpoint_folder, settings_file

INSTRUMENTED = (records, cache, verdicts, checkpoint_folder, settings_file)


def main(name: str, options: list[str]) -> None:
    """Fuzz until libFuzzer ends the process.

    Args:
        name: the target.
        options: libFuzzer's, such as `-max_total_time=10`, and corpus folders, of which the first grows.
    """
    warnings.simplefilter("ignore")
    logging.disable()
    place = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def run(data: bytes) -> None:
        folder = place / "run"
        folder.mkdir()
        try:
            targets.check(name, data, folder)
        finally:
            shutil.rmtree(folder)

    atheris.Setup([sys.argv[0], *options], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
