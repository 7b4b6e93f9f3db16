"""Layers sharded by FSDP2: all-gathered around each use, equally often in every process.

`torch.distributed.fsdp.fully_shard` gathers a module's weights in hooks around its forward. The backbone's ops read the
weights of layers whose forward is never called, so it gathers them here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def is_sharded(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Return whether `fully_shard` was applied to this module, not only to a parent or child."""
    # `fully_shard` makes the class an `FSDPModule`; importing that to check takes 0.8 s.
    return hasattr(type(module), "unshard")


def gathered(layers: nn.ModuleList | Sequence[nn.Module], i: int, step: int) -> AbstractContextManager[nn.Module]:
    """Return a context that yields layer i with its weights unsharded; a no-op if the layer is not sharded.

    All processes must enter the same contexts in the same order. FSDP2 owns the gathered weights: do not move them or
    keep them beyond the context.

    Args:
        layers: the layers of one stack.
        i: index of the layer.
        step: 1 or -1; the weights of layer i + step are prefetched.
    """
    layer = layers[i]
    return _gathered(layers, i, step) if is_sharded(layer) else contextlib.nullcontext(layer)


@contextlib.contextmanager
def _gathered(layers: nn.ModuleList | Sequence[nn.Module], i: int, step: int) -> Iterator[nn.Module]:
    layer = layers[i]
    if not hasattr(next(layer.parameters()), "to_local"):  # no DTensor: inside `whole_model`
        yield layer
        return
    sharded = cast("FSDPModule", layer)
    sharded.unshard()
    if 0 <= i + step < len(layers):
        cast("FSDPModule", layers[i + step]).unshard(async_op=True)
    try:
        yield layer
    finally:
        sharded.reshard()


@contextlib.contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """Unshard all weights of a model inside the context, so that a process can use it by itself.

    Args:
        model: a model with sharded modules; all processes must enter the context.
    """
    sharded = [module for module in model.modules() if is_sharded(module)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def least_of_all(values: Sequence[int], device: torch.device) -> list[int]:
    """Return the minimum over all processes of each value; all processes call this.

    Args:
        values: equally many in each process.
        device: a device that the process group's backend supports.
    """
    least = torch.tensor(values, device=device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return least.tolist()
