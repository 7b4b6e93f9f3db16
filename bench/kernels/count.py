"""Count the loads, stores and products of kernels in Triton's interpreter: `counted(call)`.

Nothing is timed and little is computed; products return zeros. Library calls of the launchers (e.g. `torch.mm`) are
counted by their tensors. TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from bench.kernels.shapes import label
from icae_fast.ops import _triton

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_pin_memory")
_PICKING = ("index_select", "embedding", "gather", "index")


@dataclass
class Traffic:
    """The memory traffic and operations of launches.

    Args:
        launches: number of launches.
        read, written: unique bytes per launch, which must come from or go to memory.
        requested: bytes that all blocks together load and store; a cache should serve most of the repeated ones.
        flops: multiplications and additions of products, padding and masked elements included.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    requested: int = 0
    flops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Traffic)))

    def __sub__(self, other: Traffic) -> Traffic:
        return self + other * -1

    def __mul__(self, n: int) -> Traffic:
        return Traffic(*(getattr(self, f.name) * n for f in fields(Traffic)))


class _Touched:
    """The elements of the known tensors that one launch has accessed."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self._spans = sorted((start, size) for start, size in spans.items() if size)
        self._starts = np.array([start for start, _ in self._spans], np.uint64)
        self._marks: dict[tuple[int, int], np.ndarray] = {}

    def mark(self, addresses: np.ndarray, size: int) -> None:
        """Mark the elements of `size` bytes at `addresses`."""
        if not addresses.size:
            return
        low, high = np.searchsorted(self._starts, (addresses.min(), addresses.max()), side="right") - 1
        if low == high:
            self._mark(low, addresses, size)
            return
        where = np.searchsorted(self._starts, addresses, side="right") - 1
        for i in np.unique(where):
            self._mark(i, addresses[where == i], size)

    def _mark(self, i: int, addresses: np.ndarray, size: int) -> None:
        start, length = self._spans[i]
        if i < 0 or int(addresses.max()) >= start + length:
            raise ValueError("a kernel reads or writes outside the tensors that it was given")
        if (i, size) not in self._marks:
            self._marks[i, size] = np.zeros(-(-length // size), bool)
        self._marks[i, size][(addresses - np.uint64(start)) >> np.uint64(size.bit_length() - 1)] = True

    def bytes(self) -> int:
        """Return the number of bytes accessed."""
        return sum(size * int(np.count_nonzero(marks)) for (_, size), marks in self._marks.items())


class _Counter(TorchDispatchMode):
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.tensors, self.idle, self._inside = tensors, False, False
        self.found: dict[str, Traffic] = {}

    def add(self, name: str, traffic: Traffic) -> None:
        self.found[name] = self.found.get(name, Traffic()) + traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        if func.namespace != "aten":  # an op of this package: count what it launches
            with self:
                return func(*args, **kwargs)
        flops = flop_registry.get(func._overloadpacket)
        out = func(*args, **kwargs) if flops is None else _uncomputed(func, args, kwargs)
        aliases = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = func._overloadpacket._qualified_op_name.split("::")[1]
        if name not in _ALLOCATIONS and not aliases:
            written = sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            read = _read(name, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)], written)
            work = flops(*args, **kwargs, out_val=out) if flops else 0
            self.add(str(func._overloadpacket), Traffic(1, read, written, read + written, work))
        self.tensors += [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out

    def launch(self, kernel: _triton.Kernel, grid: Any, **arguments: Any) -> None:
        if self.idle:
            return
        tensors = self.tensors + [a for a in arguments.values() if isinstance(a, torch.Tensor)]
        read, written, total = _Touched(tensors), _Touched(tensors), Traffic(1)
        self._inside = True
        try:
            with _watched(read, written, total), np.errstate(all="ignore"):
                _CALL(kernel, grid, **arguments)
        finally:
            self._inside = False
        total.read, total.written = read.bytes(), written.bytes()
        self.add(label(kernel), total)


_CALL = _triton.Kernel.__call__


def _read(name: str, tensors: list[torch.Tensor], written: int) -> int:
    """Return the bytes that a library function reads: all of its arguments, or only the elements that it gathers."""
    if name in _PICKING:
        return written + sum(t.nbytes for t in tensors if not t.is_floating_point())
    return sum(t.nbytes for t in tensors)


def _uncomputed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return zeros in the shape of a library product's result."""
    if "out" in kwargs:
        return kwargs["out"]
    shape = func(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), args), **kwargs)
    return tree_map_only(torch.Tensor, lambda t: torch.zeros_like(t, device="cpu"), shape)


@contextlib.contextmanager
def _watched(read: _Touched, written: _Touched, total: Traffic) -> Iterator[None]:
    """Record the loads, stores and products of the interpreter's builder."""
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def record(touched: _Touched, pointers: Any, mask: Any) -> None:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        addresses = pointers.data if mask.data.all() else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        total.requested += addresses.size * size
        touched.mark(addresses.ravel(), size)

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        record(read, pointers, mask)
        kind = pointers.get_element_ty()
        if not kind.is_floating():
            return load(pointers, mask, *rest)
        # Loads return zeros; masked elements keep their fill value, since kernels may compare it with -inf.
        other = rest[0].data if rest and rest[0] is not None else 0
        values = np.where(mask.data, 0, other).astype(interpreter._get_np_dtype(kind))
        return interpreter.TensorHandle(np.broadcast_to(values, pointers.data.shape), kind)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record(written, pointers, mask)
        return store(pointers, value, mask, *rest)

    def counted_dot(a: Any, b: Any, d: Any, *_: Any) -> Any:
        total.flops += 2 * a.data.size * b.data.shape[-1]
        return d

    patched = {"create_masked_load": counted_load, "create_masked_store": counted_store, "create_dot": counted_dot}
    with contextlib.ExitStack() as stack:
        for name, function in patched.items():
            stack.enter_context(mock.patch.object(builder, name, function))
        yield


def counted(call: Callable[[], Any], inputs: Any, arch: int = 0) -> dict[str, Traffic]:
    """Return the traffic of a call by the name of the kernel or library function.

    Args:
        call: calls launchers with CPU tensors.
        inputs: the tensors that kernels may access through addresses computed on the host, in any nesting.
        arch: architecture whose first configuration is used; 0 for the interpreter's configuration.
    """
    counter = _Counter([t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)])

    def launch(kernel: _triton.Kernel, grid: Any, **arguments: Any) -> None:
        counter.launch(kernel, grid, **arguments)

    patches = (mock.patch.object(_triton.Kernel, "__call__", launch), mock.patch.object(_triton, "INTERPRETER_ARCH", arch))  # noqa: E501  # fmt: skip
    with patches[0], patches[1], torch.no_grad(), counter:
        counter.idle = True  # launchers compute some things once for all layers, e.g. lists of tiles: not counted
        call()
        counter.found, counter.idle = {}, False
        call()
    return counter.found
