"""Launches a kernel that Triton has tuned and compiled for such arguments before, without asking Triton again.

Triton's way to a launch costs the host 15 to 50 us a kernel: the tuner's key, the arguments bound and specialised one
by one, options written out as text, hooks. Its outcome depends on little of the arguments: the dtypes of tensors and
whether their addresses are multiples of 16, which integers are 1, multiples of 16 or wide, what is None, and the values
of constants and of what the tuner goes by. `Cases` keeps the compiled kernel for each of these; a launch that it does
not know goes Triton's way, and so does every launch while hooks are set. `ENABLED = False` sends all of them there.
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

# How `JITFunction.run` hands a compiled kernel its launch. Where it does so in another way, `Case.launch` would be
# wrong, and is not used.
_LAUNCH = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)
_MOST_CASES = 4096  # of one kernel; more are a sign that something is no constant after all

_knobs = triton.knobs
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def _is_known_triton() -> bool:
    """Whether this Triton launches kernels as this module does."""
    try:
        source = " ".join(inspect.getsource(JITFunction.run).split())
        read = ("launch_enter_hook", "launch_exit_hook", "debug")
        settings = all(hasattr(_knobs.runtime, n) for n in read) and hasattr(_knobs.compilation, "instrumentation_mode")
        return _LAUNCH in source and settings and hasattr(CompiledKernel, "run")
    except (AttributeError, OSError, TypeError):
        return False


def _hooked(hook: Any) -> bool:
    """Whether anything would be called. A chain of no hooks has no `calls`; a function put in its place has no list."""
    return hook is not None and bool(getattr(hook, "calls", True))


SUPPORTED = _is_known_triton()


class Case(NamedTuple):
    """A compiled kernel, and how its arguments follow from a launch's.

    Args:
        run, function, metadata: of the compiled kernel.
        settings: what its configuration sets, by name.
        constants: values of the parameters that no launch gives, behind those that it gives.
        arrange: puts both into the order of the parameters; None where they have it.
    """

    run: Callable
    function: Any
    metadata: Any
    settings: Mapping[str, Any]
    constants: tuple
    arrange: Callable | None

    def launch(self, grid: Any, stream: int, arguments: Mapping[str, Any], values: list) -> None:
        """Launch on a stream, with `values` as `Cases.look` gives them."""
        blocks = grid({**arguments, **self.settings}) if callable(grid) else grid
        x, y, z = blocks if len(blocks) == 3 else (*blocks, 1, 1)[:3]
        if x and y and z:
            values += self.constants
            values = values if self.arrange is None else self.arrange(values)
            self.run(x, y, z, stream, self.function, self.metadata, None, None, None, *values)


class Cases:
    """The compiled kernels of one `triton.jit` function.

    Args:
        function: the function.
        exact: names of arguments whose values matter: constants, and what the tuner goes by.
    """

    def __init__(self, function: Any, exact: set[str]) -> None:
        self.function, self.exact = function, exact
        self.known: dict[tuple, Case] = {}

    def usable(self) -> bool:
        """Whether launches may be made here now: not with hooks, which Triton's own way calls."""
        if not (ENABLED and SUPPORTED) or self.function.pre_run_hooks:
            return False
        runtime = _knobs.runtime
        if _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook):
            return False
        return getattr(runtime, "add_stages_inspection_hook", None) is None

    def look(self, arguments: Mapping[str, Any], device: int) -> tuple[tuple, list] | None:
        """What a launch's kernel depends on, and its arguments with addresses in place of tensors.

        None where something is no plain tensor on `device`, or of an unknown kind.
        """
        exact, values = self.exact, []
        # Its first part says how to read the rest: whichever kind an argument is of, the key never means two things.
        key = [tuple(arguments), device, _knobs.runtime.debug, _knobs.compilation.instrumentation_mode]
        add, give = key.append, values.append
        for name, a in arguments.items():
            kind = type(a)
            if kind is int:
                # Wide ones are of another type. Shifted, they differ among themselves too, which does no harm.
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
        """Keep what Triton has just launched for these arguments."""
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
        if len(self.known) >= _MOST_CASES:
            self.known.clear()
        self.known[key] = Case(
            compiled.run, compiled.function, compiled.packed_metadata, dict(config.kwargs), constants, arrange
        )


def current() -> tuple[int, Callable]:
    """The current device, and what gives its current stream."""
    active = driver.active
    return active.get_current_device(), active.get_current_stream
