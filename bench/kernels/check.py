"""Compile every Triton kernel for absent GPUs and check it against limits: `python -m bench.kernels.check`.

For sm_80, sm_90 and sm_100, every configuration that a kernel may be tuned to at the shapes of `bench.kernels.shapes`
is compiled in bf16, and each configuration at least once in fp16. Registers, spills, shared memory and tensor core
instructions are read from the binary. The exit status is 1 if a limit is exceeded. No GPU is needed; binaries are
cached in `.cache/triton`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.kernels.shapes import MODEL_SAMPLE, Call, calls, label
from icae_fast.benchmark.machine import REPOSITORY

os.environ.setdefault("TRITON_CACHE_DIR", str(REPOSITORY / ".cache" / "triton"))
from bench.kernels.limits import complaints, inspect, worse
from icae_fast.ops import REGISTRY
from icae_fast.ops._triton import INTERPRETED, Launch, record_launches

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RESULTS = REPOSITORY / "docs" / "results" / "kernels.json"


@dataclass(frozen=True)
class Job:
    """One kernel to compile in one configuration.

    Args:
        kernel: the kernel's name.
        arch: compute capability, e.g. 90.
        dtype: a key of `DTYPES`.
        call: the op and the call that launched it.
        launch: the recorded launch.
        config: the Triton configuration.
    """

    kernel: str
    arch: int
    dtype: str
    call: str
    launch: Launch
    config: Any

    @property
    def facts(self) -> dict[str, Any]:
        """The identifying values of the job."""
        return {
            "kernel": self.kernel, "arch": self.arch, "dtype": self.dtype, "call": self.call,
            "config": config_name(self.config),
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Compile, and return the facts with the figures of the binary, or with `error`."""
        try:
            return self.facts | inspect(self.launch.compile(self.config), self.arch)
        except Exception as error:  # any error of the compiler belongs into the table
            return self.facts | {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"}


def config_name(config: Any) -> str:
    """Return a configuration as `NAME=VALUE` words."""
    settings = {**config.kwargs, "warps": config.num_warps, "stages": config.num_stages}
    if config.maxnreg is not None:
        settings["maxnreg"] = config.maxnreg
    return " ".join(f"{k}={v}" for k, v in settings.items())


def collect(
    listed: Iterable[Call], archs: Sequence[int], dtypes: Sequence[str], every: bool = False
) -> tuple[list[Job], list[str]]:
    """Collect every distinct kernel that the calls launch, in every configuration.

    Args:
        listed: the calls.
        archs: compute capabilities.
        dtypes: keys of `DTYPES`.
        every: compile each configuration for each shape in all dtypes, not just in the first one.

    Returns:
        The jobs, and a sentence for each op without a call and each call that failed.
    """
    jobs: list[Job] = []
    wrong: list[str] = []
    seen: set[Any] = set()
    listed = list(listed)
    served = {spec.name for spec in REGISTRY.values() if spec.gpu is not None}
    for op in sorted(served - {c.op for c in listed}):
        wrong.append(f"{op} has kernels, but no sample named {MODEL_SAMPLE!r} in its spec to compile them at")
    for arch in archs:
        for dtype in dtypes:
            whole = every or dtype == dtypes[0]
            for call in (c for c in listed if c.op in served):
                try:
                    with record_launches(arch) as launches:
                        call.launch(DTYPES[dtype])
                    jobs += [job for one in launches for job in _jobs(one, arch, dtype, call, seen, whole)]
                except Exception as error:
                    wrong.append(f"{call.op}, {call.name}, sm_{arch}, {dtype}: {type(error).__name__}: {error}")
    return jobs, wrong


def _jobs(launch: Launch, arch: int, dtype: str, call: Call, seen: set[Any], whole: bool) -> Iterator[Job]:
    for config in launch.configs():
        job = Job(label(launch.kernel), arch, dtype, f"{call.op}, {call.name}", launch, config)
        key = (arch, launch.source(config).hash() if whole else (job.kernel, dtype), str(config))
        if key not in seen:
            seen.add(key)
            yield job


def one_each(jobs: Iterable[Job], configurations: bool = False) -> list[Job]:
    """Return the first job of each kernel and architecture, or of each of their configurations."""
    first: dict[tuple[str, int, str | None], Job] = {}
    for job in jobs:
        first.setdefault((job.kernel, job.arch, str(job.config) if configurations else None), job)
    return list(first.values())


_jobs_of_workers: list[Job] = []


def compile_all(jobs: Sequence[Job], processes: int) -> list[dict[str, Any]]:
    """Return the row of each job, sorted.

    Args:
        jobs: what to compile.
        processes: number of worker processes.
    """
    if processes > 1:
        # Launches hold functions that cannot be pickled; a forked process inherits them.
        _jobs_of_workers[:] = jobs
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            rows = list(pool.imap_unordered(_run_job, range(len(jobs))))
    else:
        rows = [job.run() for job in jobs]
    return sorted(rows, key=row_key)


def _run_job(i: int) -> dict[str, Any]:
    return _jobs_of_workers[i].run()


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key by which rows are sorted and matched with recorded ones."""
    return tuple(row[name] for name in ("kernel", "arch", "dtype", "call", "config"))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the compiler's version and the rows, one per line."""
    import triton

    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the worst figures of each kernel and architecture."""
    from rich.console import Console
    from rich.table import Table

    from bench.kernels.tables import HEADINGS, kernel_cells

    table = Table(title="Kernels by architecture: the worst of all configurations")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
    for cells in kernel_cells([row for row in rows if "error" not in row]):
        table.add_row(*cells)
    Console(width=140).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel and architecture")
    parser.add_argument("--once", action="store_true", help="each configuration once, in bf16 and at one shape")
    parser.add_argument("--every", action="store_true", help="each configuration at each shape in fp16 too")
    parser.add_argument("--compare", type=Path, help="fail if a kernel is worse than in these results; write nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file for the results of a whole run")
    parser.add_argument("--only", default="", help="part of a kernel's name; write nothing")
    parser.add_argument(
        "--archs", type=int, nargs="+", default=ARCHITECTURES, help="other architectures, e.g. 89; write nothing"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    if INTERPRETED:
        print("Triton would interpret the kernels instead of compiling them; unset TRITON_INTERPRET.", file=sys.stderr)
        return 2
    part = options.quick or options.once
    jobs, wrong = collect(calls(), options.archs, ["bf16"] if part else list(DTYPES), options.every)
    jobs = [job for job in jobs if options.only in job.kernel]
    if part:
        jobs = one_each(jobs, configurations=options.once)
    rows = compile_all(jobs, options.jobs)
    print_table(rows)
    wrong += [sentence for row in rows for sentence in complaints(row)]
    if options.compare:
        wrong += worse(rows, json.loads(options.compare.read_text()))
    elif not part and not options.only and options.archs == ARCHITECTURES and not wrong:
        write(options.output, rows)
        print(f"{len(rows)} kernels compiled; wrote {options.output.name}. `make readme` puts it into docs/kernels.md.")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
