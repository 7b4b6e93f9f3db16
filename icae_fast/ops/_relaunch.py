"""A launch cache for tuned and compiled Triton kernels.

A launch through Triton costs the host 15 to 50 us: the tuner's key, binding and specialisation of each argument,
formatting of options, hooks. The compiled kernel depends only on the dtypes of tensors, on whether their addresses are
multiples of 16, on which integers are 1, multiples of 16 or wider than 32 bits, on which arguments are None, and on the
values of constants and of the tuner's key. `Cases` caches the compiled kernel under these. Unknown launches go through
Triton, and so do all launches while hooks are set or with `ENABLED = False`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ENABLED = True

# The launch statement of `JITFunction.run`. `Case.launch` replicates it, and is not used if it differs.
_LAUNCH = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)
_MAX_CASES = 4096  # limit for one kernel; more cases mean that some "constant" varies

_knobs = triton.knobs
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def _is_known_triton() -> bool:
    """Return whether this version of Triton launches kernels as this module does."""
    try:
        source = " ".join(inspect.getsource(JITFunction.run).split())
        read = ("launch_enter_hook", "launch_exit_hook", "debug")
        settings = all(hasattr(_knobs.runtime, n) for n in read) and hasattr(_knobs.compilation, "instrumentation_mode")
        return _LAUNCH in source and settings and hasattr(CompiledKernel, "run")
    except (AttributeError, OSError, TypeError):
        return False


def _hooked(hook: Any) -> bool:
    """Return whether a hook would be called: a non-empty hook chain, or a plain function without `calls`."""
    return hook is not None and bool(getattr(hook, "calls", True))


SUPPORTED = _is_known_triton()


class Case(NamedTuple):
    """A compiled kernel with the mapping from a launch's arguments to its parameters.

    Args:
        run, function, metadata: attributes of the compiled kernel.
        settings: arguments set by the configuration, by name.
        constants: values of the parameters that launches do not pass; they follow those that launches pass.
        arrange: reorders both into the order of the parameters, None if they are in order.
    """

    run: Callable
    function: Any
    metadata: Any
    settings: Mapping[str, Any]
    constants: tuple
    arrange: Callable | None

    def launch(self, grid: Any, stream: int, arguments: Mapping[str, Any], values: list) -> None:
        """Launch on a stream, with `values` as returned by `Cases.look`."""
        blocks = grid({**arguments, **self.settings}) if callable(grid) else grid
        x, y, z = blocks if len(blocks) == 3 else (*blocks, 1, 1)[:3]
        if x and y and z:
            values += self.constants
            values = values if self.arrange is None else self.arrange(values)
            self.run(x, y, z, stream, self.function, self.metadata, None, None, None, *values)


class Cases:
    """Cache of the compiled kernels of one `triton.jit` function.

    Args:
        function: the function.
        exact: names of arguments whose values are part of the key: constants, and the tuner's key.
    """

    def __init__(self, function: Any, exact: set[str]) -> None:
        self.function, self.exact = function, exact
        self.known: dict[tuple, Case] = {}

    def usable(self) -> bool:
        """Return whether the cache may be used now: not while hooks are set, which only Triton's own launch calls."""
        if not (ENABLED and SUPPORTED) or self.function.pre_run_hooks:
            return False
        runtime = _knobs.runtime
        if _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook):
            return False
        return getattr(runtime, "add_stages_inspection_hook", None) is None

    def look(self, arguments: Mapping[str, Any], device: int) -> tuple[tuple, list] | None:
        """Return a launch's cache key, and its arguments with addresses instead of tensors.

        Returns None if an argument is not a plain tensor on `device`, or of an unknown type.
        """
        exact = self.exact
        values: list[Any] = []
        # The names come first and every entry starts with its kind, so different launches never have equal keys.
        key = [tuple(arguments), device, _knobs.runtime.debug, _knobs.compilation.instrumentation_mode]
        add, give = key.append, values.append
        for name, a in arguments.items():
            kind = type(a)
            if kind is int:
                # Integers wider than 32 bits have another type; high bits make more keys than needed, which is safe.
                add(a if name in exact else 4 * (a >> 31) + 2 * (a & 15 == 0) + (a == 1))
                give(a)
            elif kind is _Tensor or kind is _Parameter:
                if a.get_device() != device:
                    return None
                address = a.data_ptr()
                add(a.dtype)
                add(address & 15 == 0)
                give(address)
            elif a is None:
                add(None)
                give(None)
            elif kind is float and name not in exact:
                add(float)
                give(a)
            elif kind is float or kind is bool or kind is str:
                add(kind)
                add(a)
                give(a)
            else:
                return None
        return tuple(key), values

    def learn(self, key: tuple, arguments: Mapping[str, Any], config: triton.Config, compiled: Any) -> None:
        """Cache the kernel that Triton has just launched for these arguments."""
        if type(compiled) is not CompiledKernel or config.pre_hook is not None:
            return
        if compiled.metadata.target.backend != "cuda":
            return
        names = [p.name for p in self.function.params]
        given = list(arguments)
        missing = [n for n in names if n not in arguments]
        defaults = {p.name: p.default for p in self.function.params if p.has_default}
        constants = tuple((defaults | config.kwargs)[n] for n in missing)
        order = [(given + missing).index(n) for n in names]
        arrange = None if order == list(range(len(given) + len(missing))) else itemgetter(*order)
        if len(self.known) >= _MAX_CASES:
            self.known.clear()
        self.known[key] = Case(
            compiled.run, compiled.function, compiled.packed_metadata, dict(config.kwargs), constants, arrange
        )


def current() -> tuple[int, Callable]:
    """Return the current device, and a function that returns a device's current stream."""
    active = driver.active
    return active.get_current_device(), active.get_current_stream
