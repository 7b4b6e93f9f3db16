"""What a result was measured on: machine, versions, commit, and the bounds that were reached in the same run."""

from __future__ import annotations

import datetime
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import icae_fast
from icae_fast.info import collect_info

REPOSITORY = Path(__file__).parents[2]

# Large enough that neither a cache nor the start of a call matters; small enough to run before every comparison.
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
READ_BYTES = {"cpu": 2**28, "cuda": 2**31}
GEMM_DTYPES = {"gemm_bf16": torch.bfloat16, "gemm_fp32": torch.float32}


def synchronize(device: torch.device | str = "cpu") -> None:
    """Wait until the device has done what was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """CPU, instruction set, threads, memory, versions, commit and date, as JSON values.

    Returns:
        `device`, `cpu`, `cores`, `threads`, `isa`, `cpu_features`, `ram_gb` (10^9 bytes), `versions`, `commit`
        (None outside a git checkout), `dirty` (uncommitted changes), `date` (UTC, ISO 8601).
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
    def run(*arguments):
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # An installed copy may lie below somebody else's repository, whose commit would say nothing about it.
        if Path(run("rev-parse", "--show-toplevel")).resolve() != REPOSITORY.resolve():
            return {"commit": None, "dirty": None}
        # Results and the tables made of them are rewritten by the run itself, and do not change what is measured.
        changes = run("status", "--porcelain", "--", ".", ":(exclude)docs", ":(exclude)README.md")
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def machine_slug(machine: dict[str, Any]) -> str:
    """A file name for the kind of machine: `amd-epyc-2-cores-avx512`, or the GPU's name."""
    parts = [machine["device"]] if machine["device"] != "cpu" else [machine["cpu"], f"{machine['cores']} cores"]
    if machine["device"] == "cpu":
        parts.append("amx" if "amx_bf16" in (machine["cpu_features"] or ()) else machine["isa"] or "no extension")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def plain_read(buffer: torch.Tensor, tries: int = 3) -> Callable[[], torch.Tensor]:
    """The faster of two calls that read a buffer over all threads and compute next to nothing: a maximum, or a sum.

    Two cores of a Zen 4 do not finish a sum at full speed; on an Emerald Rapids a maximum came at 19 GB/s, a sum at 28.
    """
    seconds = dict.fromkeys((buffer.max, buffer.sum), float("inf"))
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

    `probe()` measures again and keeps the best, so that on a shared machine a fraction of a bound never
    looks better because the bound was measured in a bad moment.

    Args:
        device: where to measure.

    Attributes:
        gemm_gflops: {"bf16", "fp32"} of a square matrix product, 10^9 operations a second. Factors in bf16 may be
            widened first: where products in fp32 are the faster ones, their rate is that of bf16 too.
        read_gbs: 10^9 bytes a second, of `plain_read` over a buffer larger than the caches, all threads.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        n = GEMM_SIZE[self.device.type]
        self._factors = {k: torch.randn(n, n, device=self.device).to(t) for k, t in GEMM_DTYPES.items()}
        self._buffer = torch.ones(READ_BYTES[self.device.type] // 4, device=self.device)
        self._read = plain_read(self._buffer)
        self.rates = dict.fromkeys((*GEMM_DTYPES, "read"), 0.0)

    def probe(self, repeats: int = 2) -> Bounds:
        """Measure every bound anew (about a quarter of a second on two cores) and keep the better value."""
        for name, a in self._factors.items():
            self._keep(name, 2 * a.shape[0] ** 3, lambda a=a: a @ a, repeats)
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
        """The rates as JSON values."""
        return {
            "gemm_gflops": {k.removeprefix("gemm_"): round(self.rates[k] / 1e9, 1) for k in GEMM_DTYPES},
            "read_gbs": round(self.rates["read"] / 1e9, 2),
        }
