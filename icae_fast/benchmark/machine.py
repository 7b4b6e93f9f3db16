"""Provenance of a result: machine, versions, commit, and the bounds reached in the same run."""

from __future__ import annotations

import datetime
import operator
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

import icae_fast
from icae_fast.info import collect_info

# The checkout that this file is run from. In a wheel it is site-packages, which is no repository: see `_git`.
REPOSITORY = Path(__file__).parents[2]

# Large enough that neither caches nor call overhead matter, small enough to run before every comparison.
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
READ_BYTES = {"cpu": 2**28, "cuda": 2**31}
GEMM_DTYPES = {"gemm_bf16": torch.bfloat16, "gemm_fp32": torch.float32}


def synchronize(device: torch.device | str = "cpu") -> None:
    """Wait until the device has finished its queued work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describe CPU, instruction set, threads, memory, versions, commit and date as JSON values.

    Args:
        device: device that is measured.

    Returns:
        `device`, `cpu`, `cores`, `threads`, `isa`, `cpu_features`, `ram_gb` (10^9 bytes), `versions`, `commit` and
        `dirty` (uncommitted changes; both None outside a git checkout), `date` (UTC, ISO 8601).
    """
    info = collect_info()
    cpu = info["cpu"]
    versions = {k: v for k, v in info["versions"].items() if v} | {"icae-fast": icae_fast.__version__}
    return {
        "device": info["device"] if torch.device(device).type == "cuda" else "cpu",
        "cpu": cpu["model"],
        "cores": cpu["cores"],
        "threads": cpu["threads"],
        "isa": cpu["isa"],
        "cpu_features": cpu["features"],
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "versions": versions,
        **_git(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _git() -> dict[str, Any]:
    def run(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # An installed package may lie inside a user's repository, whose commit says nothing about the package.
        if Path(run("rev-parse", "--show-toplevel")).resolve() != REPOSITORY.resolve():
            return {"commit": None, "dirty": None}
        # The run itself rewrites results and the tables made from them; they do not change what is measured.
        changes = run("status", "--porcelain", "--", ".", ":(exclude)docs", ":(exclude)README.md")
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def machine_slug(machine: dict[str, Any]) -> str:
    """Return a file name for the kind of machine, e.g. `amd-epyc-2-cores-avx512`, or the GPU's name."""
    parts = [machine["device"]] if machine["device"] != "cpu" else [machine["cpu"], f"{machine['cores']} cores"]
    if machine["device"] == "cpu":
        parts.append("amx" if "amx_bf16" in (machine["cpu_features"] or ()) else machine["isa"] or "no extension")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def plain_read(buffer: torch.Tensor, tries: int = 3) -> Callable[[], torch.Tensor]:
    """Return the faster of two calls that read a buffer on all threads and compute almost nothing: max or sum.

    Neither is best everywhere: two cores of a Zen 4 do not reach full bandwidth with a sum, and on an Emerald Rapids
    the maximum reached 19 GB/s and the sum 28.

    Args:
        buffer: what is read, larger than the caches.
        tries: timed calls of each; the best time counts.
    """
    reads: tuple[Callable[[], torch.Tensor], ...] = (buffer.max, buffer.sum)
    seconds = dict.fromkeys(reads, float("inf"))
    for _ in range(tries):
        for call in seconds:
            synchronize(buffer.device)
            start = time.perf_counter()
            call()
            synchronize(buffer.device)
            seconds[call] = min(seconds[call], time.perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)


class Bounds:
    """The best rates that plain torch reached on this machine in this run.

    `probe()` measures again and keeps the best. On a shared machine a fraction of a bound therefore never looks better
    because the bound was measured at a bad moment.

    Args:
        device: where to measure.

    Attributes:
        rates: operations per second of a square matrix product, `gemm_bf16` and `gemm_fp32`, and bytes per second of
            `plain_read`, `read`. If fp32 products are faster than bf16 ones, their rate counts for both, since bf16
            factors can be widened first.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        n = GEMM_SIZE[self.device.type]
        self._factors = {k: torch.randn(n, n, device=self.device).to(t) for k, t in GEMM_DTYPES.items()}
        self._buffer = torch.ones(READ_BYTES[self.device.type] // 4, device=self.device)
        self._read = plain_read(self._buffer)
        self.rates = dict.fromkeys((*GEMM_DTYPES, "read"), 0.0)

    def probe(self, repeats: int = 2) -> Bounds:
        """Measure every bound again (about a quarter of a second on two cores) and keep the better value.

        Args:
            repeats: calls for each bound.
        """
        for name, a in self._factors.items():
            self._keep(name, 2 * a.shape[0] ** 3, partial(operator.matmul, a, a), repeats)
        self.rates["gemm_bf16"] = max(self.rates["gemm_bf16"], self.rates["gemm_fp32"])
        self._keep("read", self._buffer.nbytes, self._read, repeats)
        return self

    def _keep(self, name: str, work: int, call: Callable[[], Any], repeats: int) -> None:
        for _ in range(repeats):
            synchronize(self.device)
            start = time.perf_counter()
            call()
            synchronize(self.device)
            self.rates[name] = max(self.rates[name], work / (time.perf_counter() - start))

    def as_dict(self) -> dict[str, Any]:
        """Return the rates as JSON values: `gemm_gflops` (10^9 operations/s) and `read_gbs` (10^9 bytes/s)."""
        return {
            "gemm_gflops": {k.removeprefix("gemm_"): round(self.rates[k] / 1e9, 1) for k in GEMM_DTYPES},
            "read_gbs": round(self.rates["read"] / 1e9, 2),
        }
