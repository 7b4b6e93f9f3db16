"""Check and time everything on a GPU in one command: `python -m bench.gpu.check`.

It checks every op and the golden cases, times compressing, answering and training against the baseline, runs
`torch.compile` and every attention backend, and lists the tuned configurations. Results go into a folder
`gpu-check-NAME/`, as JSON and as a readable report. A failing part is recorded and the rest continues. The exit status
is 0, 1 if a part failed, or 3 without a GPU. No network is used. `--device cpu --small` runs the same code at small
sizes on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from icae_fast.benchmark.machine import REPOSITORY, describe_machine, machine_slug
from icae_fast.benchmark.measure import rounded

os.environ.setdefault("TRITON_CACHE_DIR", str(REPOSITORY / ".cache" / "triton"))
from bench.gpu import parts as gpu_parts
from bench.gpu import timings as gpu_timings
from bench.gpu.report import report
from bench.gpu.setting import Setting
from bench.harness.compare import write_json

NO_GPU = 3
_JOBS = min(12, os.cpu_count() or 1)  # each process takes half a GB of GPU memory


Part = tuple[str, Callable[[Setting], dict[str, Any]]]


def parts(setting: Setting) -> Iterator[Part]:
    """Yield the name of each part and the function that runs it; a part's result may hold a list of `failures`."""
    yield "ops", gpu_parts.ops
    yield "ops at real sizes", gpu_parts.ops_at_real_sizes
    yield "golden cases", gpu_parts.golden
    for case in gpu_timings.cases(setting):
        yield f"encode {case.name}", gpu_timings.encoding(case)
        yield f"answer {case.name}", gpu_timings.answering(case)
        if case.documents * case.tokens > 8 * 512:  # the other parts use one document, or a few spans
            continue
        yield f"latency {case.name}", gpu_timings.latency(case)
        yield f"train {case.name}", gpu_timings.training(case)
        yield f"torch.compile {case.name}", gpu_timings.compiled(case)
        yield f"attention backends {case.name}", gpu_timings.attention_backends(case)
    yield "tuned configurations", gpu_parts.tuned


def run_part(run: Callable[[Setting], dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """Run a part and return its result with `seconds` and `ok`, or with `error` (a traceback) if it raised."""
    start = time.perf_counter()
    try:
        result = run(setting)
    except Exception:
        result = {"error": traceback.format_exc()}
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    failed = "error" in result or bool(result.get("failures"))
    return {"ok": not failed, "seconds": time.perf_counter() - start, **result}


def gpu_facts() -> dict[str, Any]:
    """Return the properties of the GPU."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def check(setting: Setting, folder: Path, only: str = "") -> bool:
    """Run all parts whose name contains `only`, and write `results.json` and `report.md` after each.

    Args:
        setting: how the check runs.
        folder: output folder, made if it does not exist.
        only: part of a part's name.

    Returns:
        Whether all parts passed.
    """
    machine = describe_machine(setting.device)
    gpu = gpu_facts() if setting.device == "cuda" else None
    result: dict[str, Any] = {"machine": machine, "gpu": gpu, "small": setting.small, "parts": {}}
    folder.mkdir(parents=True, exist_ok=True)
    for name, run in parts(setting):
        if only not in name:
            continue
        print(f"{name} ...", end=" ", flush=True)
        part = result["parts"][name] = rounded(run_part(run, setting))
        print(f"{'ok' if part['ok'] else 'FAILED'}, {part['seconds']:.1f} s", flush=True)
        # Written after every part, so that a crash of the process keeps the earlier results.
        write_json(folder / "results.json", result)
        (folder / "report.md").write_text(report(result))
    return all(part["ok"] for part in result["parts"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small models, one round")
    parser.add_argument("--only", default="", help="run only parts whose name contains this")
    parser.add_argument("--random", action="store_true", help="SmolLM2's shape with random weights")
    parser.add_argument("--jobs", type=int, default=_JOBS, help="processes that check ops (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(), help="where to make the result folder")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU; run this on a machine with an NVIDIA GPU, or add --device cpu", file=sys.stderr)
        return NO_GPU
    setting = Setting(options.device, options.small, options.random, 1 if options.small else max(1, options.jobs))
    folder = options.output / f"gpu-check-{machine_slug(describe_machine(setting.device))}"
    passed = check(setting, folder, options.only)
    print(f"{'All parts passed.' if passed else 'Some parts failed.'} Please send us the folder {folder}.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
