"""Weights that an op reads together as one tensor that shares its memory with the modules' parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from icae_fast.backbone.families.view import LayerView
from icae_fast.backbone.hooks import check_projections
from icae_fast.backbone.sharding import is_sharded


def packed_qkv(layer: LayerView) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return W_q, W_k and W_v of a layer as one tensor, and their biases likewise; see `packed`.

    Returns:
        weight ((Hq + 2 Hkv) D, d) and bias ((Hq + 2 Hkv) D,) or None.

    Raises:
        UnsupportedModelError: see `icae_fast.backbone.hooks.check_projections`.
    """
    if not torch.compiler.is_compiling():  # `Backbone.compile` packs before it runs
        check_projections(layer)
    return packed(layer.qkv, move=not is_sharded(layer.module))


def packed_gate_up(layer: LayerView) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return W_gate and W_up of a layer whose `swiglu` is not None as one tensor, and their biases likewise.

    Returns:
        weight (2 m, d) and bias (2 m,) or None.
    """
    return packed(layer.gate_up, move=not is_sharded(layer.module))


def qk_norm_weights(layer: LayerView) -> torch.Tensor | None:
    """Return the (2, D) weights of the norms of query and key heads, None for a model without them."""
    norms = layer.qk_norm
    return None if norms is None else torch.stack((norms[0].weight, norms[1].weight)).detach()


def packed(modules: Sequence[nn.Linear], *, move: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights of linear modules, concatenated along their rows, as one tensor in the modules' memory.

    The first call moves the weights into one block and makes the modules' parameters views of it, so there is no second
    copy. Later calls find them adjacent and only make the view. Loading, saving and training the modules work as
    before.

    Args:
        modules: linear modules with equally many input features, in the order of their rows.
        move: False for weights whose memory must not be replaced, such as those that FSDP2 gathered: they are copied.

    Returns:
        weight (rows of all modules, d) and bias (rows of all modules,) or None.
    """
    weight = _packed([weight_of(m) for m in modules], move)
    return weight, None if modules[0].bias is None else _packed([m.bias for m in modules], move)


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return a module's weight. `nn.Module.__getattr__` takes ten times as long as the dictionary."""
    found = module._parameters.get("weight")
    return cast(torch.Tensor, module.weight) if found is None else found


def _packed(parameters: Sequence[torch.Tensor], move: bool) -> torch.Tensor:
    if not move:
        return torch.cat([p.detach() for p in parameters])
    first = parameters[0]
    # A traced graph cannot read addresses; `Backbone.compile` packs before it runs.
    if not torch.compiler.is_compiling() and not _adjacent(parameters):
        with torch.inference_mode(False), torch.no_grad():  # parameters outlive the caller's mode
            block = torch.cat([p.detach() for p in parameters])
            for p, rows in zip(parameters, block.split([p.shape[0] for p in parameters]), strict=True):
                p.data = rows
    rows, base = sum(p.shape[0] for p in parameters), first.detach() if torch.is_grad_enabled() else first
    return base.as_strided((rows, *first.shape[1:]), first.stride())


def _adjacent(parameters: Sequence[torch.Tensor]) -> bool:
    """Return whether parameters lie one behind the other in one storage."""
    address = parameters[0].data_ptr()
    end = parameters[0].untyped_storage().data_ptr() + parameters[0].untyped_storage().nbytes()
    for p in parameters:
        if p.data_ptr() != address or not p.is_contiguous():
            return False
        address += p.nbytes
    return address <= end
