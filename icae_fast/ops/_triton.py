"""Launch Triton kernels on a GPU or in Triton's interpreter, or record the launches.

A kernel is a `triton.jit` function under `@kernel(configs=...)`, and is launched by `k(grid, x=..., n=..., BLOCK=...)`:

* with tensors on a GPU, the best of its configurations for that GPU runs; Triton measures them once for each
  `key` and stores the choice on disk (under TRITON_CACHE_DIR);
* under `TRITON_INTERPRET=1` the first configuration for architecture 0 runs on CPU tensors;
* inside `record_launches(arch)` nothing runs. From the recorded launches `bench/kernels/check.py` compiles every
  configuration for GPUs that are not present. Use tensors on the device `meta` there.
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

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's default, which warns if it is unset
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
_recording: _Recording | None = None


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
            grid: blocks along up to three axes, or a function of all arguments, including the configuration's, that
                returns them. Nothing is launched if one of them is 0.
            arguments: the kernel's arguments by name, except those that configurations set.
        """
        if _recording is not None:
            _recording.launches.append(Launch(self, grid, dict(arguments), _recording.arch))
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
        with self._lock:  # the tuner remembers only its last configuration
            tuner = self._tuner(arguments)
            compiled = tuner[grid](**arguments)
            self._cases.learn(key, arguments, tuner.best_config, compiled)

    def _tuner(self, arguments):
        device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
        # Everything that configurations may depend on, as a cache key.
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
            "a Triton kernel has to be tuned by timing its configurations, which is impossible while a CUDA graph is "
            "captured; run the same call once before the capture"
        )
    return driver.active.get_benchmarker()(call, quantiles=quantiles)


def kernel(configs: Configs, key: tuple[str, ...] = ()) -> Callable[[Any], Kernel]:
    """Return a decorator of `triton.jit` functions.

    Args:
        configs: `configs(arch, arguments)` returns the configurations to try on an architecture (80, 89, 90, 100; 0 for
            the interpreter, where the first should be small enough that samples take several blocks). It may depend on
            dtypes, constants, the arguments in `key`, and on which arguments are None.
        key: names of arguments; the choice is made separately for each combination of their values.
    """
    return lambda function: Kernel(function, configs, key)


@triton.jit
def load_row(pointer, columns, size):
    """Load elements of a row in fp32, zeros from `size` on."""
    return tl.load(pointer + columns, mask=columns < size, other=0.0).to(tl.float32)


@functools.cache
def architecture(device: torch.device) -> int:
    """Return the compute capability of a GPU as one number, e.g. 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def target(device: torch.device) -> int:
    """Return the architecture of a launch with tensors on this device, also when recording or interpreting."""
    if _recording is not None:
        return _recording.arch
    return INTERPRETER_ARCH if INTERPRETED else architecture(device)


@dataclass(frozen=True)
class Launch:
    """A recorded launch."""

    kernel: Kernel
    grid: Grid
    arguments: dict[str, Any]
    arch: int

    def blocks(self, config: triton.Config) -> tuple[int, ...]:
        """Return the grid with one of the configurations."""
        return self.grid(self.arguments | config.kwargs) if callable(self.grid) else self.grid

    def configs(self) -> list[triton.Config]:
        """Return the configurations to try on this architecture."""
        return self.kernel.configs(self.arch, self.arguments)

    def source(self, config: triton.Config) -> ASTSource:
        """Return the compiler's input, specialised as by a launch on a GPU."""
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
        """Compile the kernel with one configuration for this architecture; needs no GPU."""
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
class _Recording:
    arch: int
    launches: list[Launch]


@contextlib.contextmanager
def record_launches(arch: int) -> Iterator[list[Launch]]:
    """Record launches for an architecture instead of running them; yields the list of records."""
    global _recording
    before, _recording = _recording, _Recording(arch, [])
    try:
        yield _recording.launches
    finally:
        _recording = before
