"""Launches Triton kernels: on a GPU, in Triton's interpreter, or on paper.

A kernel is a `triton.jit` function under `@kernel(configs=...)`, and is launched by `k(grid, x=..., n=..., BLOCK=...)`:

* with tensors on a GPU, the best of its configurations for that GPU runs; Triton measures them once for each
  `key` and keeps the choice on disk (under TRITON_CACHE_DIR);
* under `TRITON_INTERPRET=1` the first configuration for architecture 0 runs on tensors of the CPU;
* inside `on_paper(arch)` nothing runs: launches are recorded, from which `bench/kernels/check.py` compiles every
  configuration for GPUs that are not there. Tensors are best on the device `meta` then.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.9 does, and warns of where nothing is said
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from icae_fast.errors import BackendError
from icae_fast.ops._relaunch import Cases, current

INTERPRETED = triton.knobs.runtime.interpret
INTERPRETER_ARCH = 0

Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]
Configs = Callable[[int, Mapping[str, Any]], list[triton.Config]]

_POINTEES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip
_paper: _Paper | None = None


class Kernel:
    """A Triton kernel and its configurations; see `kernel`."""

    def __init__(self, function: Any, configs: Configs, key: tuple[str, ...]) -> None:
        self.function, self.configs, self.key = function, configs, key
        self.name = function.__name__
        constants = () if INTERPRETED else (p.name for p in function.params if p.is_constexpr)
        self._deciding = {*key, *constants}
        self._tuners: dict[tuple, Any] = {}
        self._cases = Cases(function, self._deciding)
        self._lock = threading.RLock()

    def __call__(self, grid: Grid, **arguments: Any) -> None:
        """Launch.

        Args:
            grid: blocks along up to three axes, or what gives them from all arguments, those of the configuration
                included. Nothing is launched where one of them is 0.
            arguments: all of the kernel's but those that configurations set, by name.
        """
        if _paper is not None:
            _paper.launches.append(Launch(self, grid, dict(arguments), _paper.arch))
        elif INTERPRETED:
            config = self.configs(INTERPRETER_ARCH, arguments)[0]
            blocks = grid(arguments | config.kwargs) if callable(grid) else grid
            if all(blocks):
                self.function[blocks](**arguments, **config.kwargs)
        elif callable(grid) or all(grid):
            self._launch(grid, arguments)

    def _launch(self, grid, arguments):
        looked = None
        if self._cases.usable():
            device, stream_of = current()
            looked = self._cases.look(arguments, device)
        if looked is None:
            self._tuner(arguments)[grid](**arguments)
            return
        key, values = looked
        case = self._cases.known.get(key)
        if case is not None:
            case.launch(grid, stream_of(device), arguments, values)
            return
        with self._lock:  # the tuner says which configuration it took last
            tuner = self._tuner(arguments)
            compiled = tuner[grid](**arguments)
            self._cases.learn(key, arguments, tuner.best_config, compiled)

    def _tuner(self, arguments):
        device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
        # All that configurations may depend on, so that they are not made anew for every launch.
        case = (
            device,
            *(
                a.dtype if isinstance(a, torch.Tensor) else a if name in self._deciding else a is None
                for name, a in arguments.items()
            ),
        )
        if case not in self._tuners:
            configs = self.configs(architecture(device), arguments)
            names = tuple(map(str, configs))
            self._tuners[case] = self._tuners[names] = self._tuners.get(names) or triton.autotune(
                configs, list(self.key), cache_results=True, do_bench=_measure
            )(self.function)
        return self._tuners[case]


def _measure(call, quantiles):
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "a Triton kernel has configurations to choose from by time, which cannot be done while a CUDA graph is "
            "captured; run the same call once before the capture"
        )
    return driver.active.get_benchmarker()(call, quantiles=quantiles)


def kernel(configs: Configs, key: tuple[str, ...] = ()) -> Callable[[Any], Kernel]:
    """Decorates a `triton.jit` function.

    Args:
        configs: `configs(arch, arguments)` gives what to try on an architecture (80, 89, 90, 100; 0 for the
            interpreter, where the first one should be small enough that samples take several blocks). It may depend
            on dtypes, on constants, on what `key` names, and on which arguments are None.
        key: names of arguments for each of whose values the choice is made anew.
    """
    return lambda function: Kernel(function, configs, key)


@triton.jit
def load_row(pointer, columns, size):
    """Elements of a row in fp32, zeros from `size` on."""
    return tl.load(pointer + columns, mask=columns < size, other=0.0).to(tl.float32)


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability of a GPU as one number, such as 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def target(device: torch.device) -> int:
    """The architecture that a launch with tensors on this device is for now, on paper and interpreted too."""
    if _paper is not None:
        return _paper.arch
    return INTERPRETER_ARCH if INTERPRETED else architecture(device)


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made."""

    kernel: Kernel
    grid: Grid
    arguments: dict[str, Any]
    arch: int

    def blocks(self, config: triton.Config) -> tuple[int, ...]:
        """The grid with one of the configurations."""
        return self.grid(self.arguments | config.kwargs) if callable(self.grid) else self.grid

    def configs(self) -> list[triton.Config]:
        """The configurations to try on this architecture."""
        return self.kernel.configs(self.arch, self.arguments)

    def source(self, config: triton.Config) -> ASTSource:
        """What the compiler is given, specialised as a launch on a GPU specialises it."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.function.params):
            name = parameter.name
            value = config.kwargs.get(name, self.arguments.get(name))
            kind = "constexpr" if parameter.is_constexpr or value is None else _kind(value)
            special = not parameter.do_not_specialize
            if special and kind[0] in "iu" and value == 1:
                kind = "constexpr"
            signature[name] = kind
            if kind == "constexpr":
                constants[(i,)] = value
            elif special and _divisible(value):
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel.function, signature, constants, attributes)

    def compile(self, config: triton.Config) -> Any:
        """The kernel compiled by one configuration for this architecture; needs no GPU."""
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "num_ctas": config.num_ctas}
        if config.maxnreg is not None:
            options["maxnreg"] = config.maxnreg
        return triton.compile(self.source(config), target=GPUTarget("cuda", self.arch, 32), options=options)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _POINTEES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _divisible(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


@dataclass
class _Paper:
    arch: int
    launches: list[Launch]


@contextlib.contextmanager
def on_paper(arch: int) -> Iterator[list[Launch]]:
    """Record launches for an architecture instead of making them; gives the list that they are written to."""
    global _paper
    before, _paper = _paper, _Paper(arch, [])
    try:
        yield _paper.launches
    finally:
        _paper = before
