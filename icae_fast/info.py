"""Facts about the installation and the machine: versions, CPU features, and the backend of each op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from icae_fast.ops import EXTENSION_ERROR, REGISTRY, backend_of

_PACKAGES = ("icae-fast", "torch", "transformers", "peft", "triton", "flash-attn", "liger-kernel", "accelerate")


def collect_info() -> dict[str, Any]:
    """Return versions, device, CPU features, instruction sets, threads, and the backend of each op, as JSON values.

    Under `cpu`: `isa` is the instruction set of the kernels that run, `build.isas` are the sets in this build, and
    `runnable_isas` are the sets in this build that this CPU supports.
    """
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()} | _isa(),
        "extension": "loaded" if EXTENSION_ERROR is None else f"not loaded: {EXTENSION_ERROR}",
        "ops": {name: {d: backend_of(name, d) for d in ("cpu", "cuda")} for name in sorted(REGISTRY)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _isa() -> dict[str, Any]:
    if EXTENSION_ERROR is not None:
        return {"isa": None, "runnable_isas": None, "features": None}
    from icae_fast import _C

    runs = {"isa": _C.isa(), "runnable_isas": _C.runnable_isas(), "features": _C.cpu_features()}
    return runs | {"build": _C.build_info()}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
