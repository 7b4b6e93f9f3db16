"""Layers whose weights FSDP2 holds in shares: gathered around each use, and equally often in every process.

`torch.distributed.fsdp.fully_shard` gathers a module's weights in hooks around its calls. The backbone's ops read the
weights of layers that are never called, so it asks for them here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module itself, and not only to one around or inside it."""
    # That makes its class one of `FSDPModule`'s; importing this to ask for it takes 0.8 s.
    return hasattr(type(module), "unshard")


def gathered(layers: Sequence[nn.Module], i: int, step: int) -> AbstractContextManager[nn.Module]:
    """Gives layer i, its weights in one piece while the context lasts; nothing happens where it is not sharded.

    Each process must enter the same contexts in the same order. The weights that are gathered belong to FSDP2: they
    must not be moved, nor kept beyond the context.

    Args:
        layers: of one stack.
        i: which of them.
        step: 1 or -1, to the layer whose weights come next and are sent meanwhile.
    """
    layer = layers[i]
    return _gathered(layers, i, step) if is_sharded(layer) else contextlib.nullcontext(layer)


@contextlib.contextmanager
def _gathered(layers, i, step):
    layer = layers[i]
    if not hasattr(next(layer.parameters()), "to_local"):  # no DTensor: inside `whole_model`
        yield layer
        return
    layer.unshard()
    if 0 <= i + step < len(layers):
        layers[i + step].unshard(async_op=True)
    try:
        yield layer
    finally:
        layer.reshard()


@contextlib.contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """Every process has all weights of a model in one piece, so that any of them may use it by itself.

    Args:
        model: whatever of it is sharded is gathered; all processes call this.
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
    """The least that any process gives, for each value; all processes call this.

    Args:
        values: as many in each process.
        device: one that the processes' backend sends from.
    """
    least = torch.tensor(values, device=device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return least.tolist()
