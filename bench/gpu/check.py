"""Everything that there is to check and to time on a GPU, in one command: `python -m bench.gpu.check`.

Correctness of every op, the golden cases, compressing, answering and training beside the baseline, `torch.compile`,
attention's backends, and the configurations that tuning chose. All of it goes into a folder `gpu-check-NAME/`, as JSON
and as a report to read. A part that fails is written down, and the rest goes on. Exit status: 0, 1 where a part failed,
3 without a GPU. No network is used. `--device cpu --small` runs the same code at small sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icae_fast.benchmark.machine import REPOSITORY, describe_machine, machine_slug
from icae_fast.benchmark.measure import rounded

os.environ.setdefault("TRITON_CACHE_DIR", str(REPOSITORY / ".cache" / "triton"))
NO_GPU = 3
_JOBS = min(12, os.cpu_count() or 1)  # each has half a GB of the GPU for itself


@dataclass(frozen=True)
class Setting:
    """Where a check runs.

    Args:
        device: "cuda", or "cpu" to try the code itself.
        small: small models and few rounds.
        random: SmolLM2's shape with random weights, so that its package need not be there.
        jobs: processes that check ops.
    """

    device: str = "cuda"
    small: bool = False
    random: bool = False
    jobs: int = 1

    @property
    def rounds(self) -> int:
        """Interleaved rounds of a timing."""
        return 1 if self.small else 5


Part = tuple[str, Callable[[Setting], dict[str, Any]]]


def parts(setting: Setting) -> Iterator[Part]:
    """Names of all parts and what runs them; what a part gives may have a list of `failures`."""
    from bench.gpu import parts as gpu_parts
    from bench.gpu import timings as gpu_timings

    yield "ops", gpu_parts.ops
    yield "ops at real sizes", gpu_parts.ops_at_real_sizes
    yield "golden cases", gpu_parts.golden
    for case in gpu_timings.cases(setting):
        yield f"encode {case.name}", gpu_timings.encoding(case)
        yield f"answer {case.name}", gpu_timings.answering(case)
        if case.documents * case.tokens > 8 * 512:  # what follows takes one document, or a few spans
            continue
        yield f"latency {case.name}", gpu_timings.latency(case)
        yield f"train {case.name}", gpu_timings.training(case)
        yield f"torch.compile {case.name}", gpu_timings.compiled(case)
        yield f"attention backends {case.name}", gpu_timings.attention_backends(case)
    yield "tuned configurations", gpu_parts.tuned


def run_part(run: Callable[[Setting], dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """What a part gives, with `seconds` and `ok`, and `error` with its traceback where it raised."""
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
    """What the GPU is."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def check(setting: Setting, folder: Path, only: str = "") -> bool:
    """Run all parts whose name has `only` in it, and write `results.json` and `report.md` after each.

    Returns:
        Whether all of them are well.
    """
    from bench.gpu.report import report

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
        # Written anew each time, so that a crash of the process leaves what was found before it.
        (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "report.md").write_text(report(result))
    return all(part["ok"] for part in result["parts"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small models, one round")
    parser.add_argument("--only", default="", help="part of a part's name")
    parser.add_argument("--random", action="store_true", help="SmolLM2's shape with random weights")
    parser.add_argument("--jobs", type=int, default=_JOBS, help="processes that check ops (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(), help="where the folder is made")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here that torch can use; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return NO_GPU
    setting = Setting(options.device, options.small, options.random, 1 if options.small else max(1, options.jobs))
    folder = options.output / f"gpu-check-{machine_slug(describe_machine(setting.device))}"
    well = check(setting, folder, options.only)
    print(f"{'All parts are well.' if well else 'Some parts failed.'} Please send back the folder {folder}.")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
