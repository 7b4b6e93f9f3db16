"""Fuzz all targets, several at a time, and print executions and failures: `python -m fuzz --seconds 10`."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fuzz import CORPORA
from fuzz.targets import TARGETS

_LONGEST_INPUT, _MEGABYTES, _ONE_RUN, _SHOWN_LINES = 65_536, 4096, 60, 8


@dataclass(frozen=True)
class Result:
    """What fuzzing one target found.

    Args:
        name: the target.
        executions: inputs tried.
        failure: the traceback and libFuzzer's last lines, empty if every input was read or refused with a typed error.
        added: inputs that reached new code.
    """

    name: str
    executions: int
    failure: str
    added: int


def fuzz(name: str, seconds: int, found: Path, runs: int | None) -> Result:
    """Fuzz one target in a process of its own.

    Args:
        name: the target.
        seconds: the time.
        found: the folder for inputs that fail, and, under `corpora/NAME`, for those that reach new code.
        runs: stop after this number of executions.
    """
    corpus = found / "corpora" / name
    corpus.mkdir(parents=True, exist_ok=True)
    before = len(list(corpus.iterdir()))
    command = [
        sys.executable, "-m", "fuzz.one", name, f"-max_total_time={seconds}", "-print_final_stats=1",
        f"-artifact_prefix={found / name}-", f"-max_len={_LONGEST_INPUT}", f"-rss_limit_mb={_MEGABYTES}",
        f"-timeout={_ONE_RUN}", *([f"-runs={runs}"] if runs else []), str(corpus), str(CORPORA / name),
    ]  # fmt: skip
    # One thread: tensors are small, and the next target runs on the other core.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CORPORA.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    executions = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    failed = done.returncode != 0 or executions is None
    tail = (done.stdout + "\n".join(done.stderr.splitlines()[-_SHOWN_LINES:])) if failed else ""
    return Result(name, int(executions[1]) if executions else 0, tail, len(list(corpus.iterdir())) - before)


def main() -> int:
    """Fuzz, print a line for each target, and return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="default all")
    parser.add_argument("--seconds", type=int, default=10, help="for each target")
    parser.add_argument("--runs", type=int, help="executions after which a target ends earlier")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"), help="folder for inputs that fail")
    options = parser.parse_args()
    found = options.found.resolve()
    found.mkdir(parents=True, exist_ok=True)
    names = options.targets or list(TARGETS)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda name: fuzz(name, options.seconds, found, options.runs), names))
    for result in results:
        state = "FAILED" if result.failure else "ok"
        print(f"{result.name}\t{result.executions} executions\t{result.added} new inputs\t{state}", flush=True)
    for result in results:
        if result.failure:
            print(f"\n{result.name}: the input is {found / result.name}-*\n{result.failure}")
    return int(any(result.failure for result in results))


if __name__ == "__main__":
    for left in Path(tempfile.gettempdir()).glob("fuzz-*"):
        shutil.rmtree(left, ignore_errors=True)
    sys.exit(main())
