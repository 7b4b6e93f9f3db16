"""The parts of `bench.gpu.check` that check results."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bench.gpu.setting import Setting
from bench.kernels.shapes import Call, Inputs, calls
from icae_fast.benchmark.machine import REPOSITORY
from icae_fast.ops import REGISTRY, OpSpec, backend_of
from icae_fast.testing import check_op, make_inputs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def ops(setting: Setting) -> dict[str, Any]:
    """Check every op in every dtype over all samples of its spec against the error budget."""
    return _all(_samples, REGISTRY, setting)


def ops_at_real_sizes(setting: Setting) -> dict[str, Any]:
    """Check every op at the shapes of `bench.kernels.shapes`, with random values."""
    return _all(_real_sizes, dict.fromkeys(c.op for c in _calls(setting)), setting)


def _all(
    check: Callable[[str, str, Setting], tuple[dict[str, Any], list[str]]], names: Iterable[str], setting: Setting
) -> dict[str, Any]:
    """Return the rows of `check` for each op and dtype, computed in `setting.jobs` processes.

    Most of the time is compilation: 13 processes on 16 cores finished 39 of 44 such tasks in 135 s, 774 s of work.
    """
    tasks = [(name, dtype, setting) for name in names for dtype, _ in _dtypes(REGISTRY[name], setting)]
    if setting.jobs == 1:
        found = [check(*task) for task in tasks]
    else:
        with multiprocessing.get_context("spawn").Pool(setting.jobs) as pool:  # forked processes cannot use the GPU
            found = pool.starmap(check, tasks, chunksize=1)
    return {"rows": [row for row, _ in found], "failures": [w for _, wrong in found for w in wrong]}


def _samples(name: str, dtype: str, setting: Setting) -> tuple[dict[str, Any], list[str]]:
    """Return the row of an op in a dtype over the samples of its spec, and its failures."""
    spec = REGISTRY[name]
    cases = ((s.name, lambda s=s: make_inputs(s, DTYPES[dtype], setting.device)) for s in spec.samples)
    return _checked(spec, dtype, setting, cases)


def _real_sizes(name: str, dtype: str, setting: Setting) -> tuple[dict[str, Any], list[str]]:
    """Return the row of an op in a dtype at the shapes of `bench.kernels.shapes`, and its failures."""
    own = [c for c in _calls(setting) if c.op == name]
    cases = ((c.name, lambda c=c: _real_arguments(c, DTYPES[dtype], setting.device)) for c in own)
    return _checked(REGISTRY[name], dtype, setting, cases)


def _checked(
    spec: OpSpec, dtype: str, setting: Setting, cases: Iterable[tuple[str, Callable[[], dict[str, Any]]]]
) -> tuple[dict[str, Any], list[str]]:
    found = [_complaint(spec, make, setting, name) for name, make in cases]
    wrong = [f"{dtype}: {w}" for w in found if w]
    backend = backend_of(spec.name, setting.device)
    row = {"op": spec.name, "backend": backend, "dtype": dtype, "samples": len(found), "failed": len(wrong)}
    return row, wrong


def _calls(setting: Setting) -> list[Call]:
    return [c for c in calls() if not setting.small or (c.op, c.name) == ("rms_norm", "smollm2-135m encode")]


def _dtypes(spec: OpSpec, setting: Setting) -> Iterator[tuple[str, torch.dtype]]:
    served = spec.dtypes[backend_of(spec.name, setting.device)]
    return ((name, dtype) for name, dtype in DTYPES.items() if dtype in served)


def _complaint(spec: OpSpec, make: Callable[[], dict[str, Any]], setting: Setting, sample: str) -> str | None:
    """Return what is wrong with an op's results for the arguments that `make` returns, None if they are right."""
    backend = backend_of(spec.name, setting.device)
    try:
        check_op(spec, backend, make())
    except Exception as error:  # a failing sample must not stop the others
        lines = str(error).strip().splitlines()
        return f"{spec.name}, sample {sample!r}: {type(error).__name__}: {lines[0] if lines else ''}"
    return None


def _real_arguments(call: Call, dtype: torch.dtype, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(1)
    arguments = call.make(Inputs(dtype, device, generator))
    if call.op == "varlen_attention_backward":  # needs the results of a real forward
        forward = {n: arguments[n] for n in REGISTRY["varlen_attention"].argument_names}
        arguments["out"], arguments["lse"] = REGISTRY["varlen_attention"].reference(**forward)
    elif call.op == "swiglu_backward" and arguments["gate_up"].numel():
        forward = {n: arguments[n] for n in ("x", "weight", "bias")}
        arguments["gate_up"] = REGISTRY["swiglu"].reference(**forward, keep=True)[1]
    return arguments


def golden(setting: Setting) -> dict[str, Any]:
    """Run `tests/model/test_golden.py` on the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "tests/model/test_golden.py"]
    command += ["--device", setting.device, "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    lines = run.stdout.strip().splitlines()
    failures = [] if run.returncode == 0 else [f"pytest ended with {run.returncode}"]
    return {"summary": lines[-1] if lines else "", "output": [] if not failures else lines[-60:], "failures": failures}


def tuned(setting: Setting) -> dict[str, Any]:
    """Return the tuned configuration of each kernel for each key."""
    if setting.device != "cuda":
        return {"rows": [], "note": "nothing is tuned without a GPU"}
    from icae_fast.ops._triton import Kernel

    rows = []
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith("icae_fast.ops.") and m is not None]
    kernels = {id(k): (m.__name__, k) for m in modules for k in vars(m).values() if isinstance(k, Kernel)}
    for module, kernel in kernels.values():
        for tuner in kernel._tuners.values():
            for key, config in tuner.cache.items():
                timings = getattr(tuner, "configs_timings", None) or {}
                tried = {str(c): t for c, t in timings.items()}  # timings of the last tuned key
                rows.append({
                    "kernel": f"{module.removeprefix('icae_fast.ops.')}.{kernel.name}", "key": [str(k) for k in key],
                    "config": str(config), "last_timings_ms": tried,
                })  # fmt: skip
    return {"rows": rows}
