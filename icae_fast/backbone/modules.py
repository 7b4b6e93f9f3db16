"""Compute one module by an op of this package, or by the module's own forward where the op does not apply."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from icae_fast.backbone.families.types import RMSNorm
from icae_fast.backbone.families.view import LayerView
from icae_fast.backbone.hooks import is_hooked
from icae_fast.backbone.packing import packed_gate_up, weight_of
from icae_fast.ops import linear, rms_norm, swiglu


def is_plain(module: nn.Module, x: torch.Tensor) -> bool:
    """Return whether an op may read a module's weights: frozen, in the dtype of x, without hooks or another forward."""
    return not is_hooked(module) and _computable(module, x.dtype, torch.is_grad_enabled())


def is_plain_norm(module: nn.Module, x: torch.Tensor) -> TypeGuard[RMSNorm]:
    """Return whether `rms_norm` computes what a norm module does."""
    return "variance_epsilon" in module.__dict__ and is_plain(module, x)


def is_plain_linear(module: nn.Module, x: torch.Tensor) -> TypeGuard[nn.Linear]:
    """Return whether `linear` computes what a module does."""
    return type(module) is nn.Linear and is_plain(module, x)


def is_plain_mlp(layer: LayerView, x: torch.Tensor) -> bool:
    """Return whether `swiglu` and `linear` compute what a layer's MLP does."""
    linears = layer.swiglu
    if linears is None or not is_plain(layer.mlp, x):  # checks the parameters of the three linear modules too
        return False
    gate, up, down = linears
    return not (is_hooked(gate) or is_hooked(up) or is_hooked(down)) and (gate.bias is None) == (up.bias is None)


def norm_op(module: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the RMS norm of `residual + x` by a plain norm module's weight, and that sum."""
    return rms_norm(x, weight_of(module), module.variance_epsilon, residual=residual)


def apply_norm(module: nn.Module, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of `residual + x`, and that sum."""
    if is_plain_norm(module, x):
        return norm_op(module, x, residual)
    total = x if residual is None else residual + x
    return module(total), total


def linear_op(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return a plain linear module's product."""
    return linear(x, weight_of(module), module.bias)


def apply_linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return a linear module's product."""
    return linear_op(module, x) if is_plain_linear(module, x) else module(x)


def apply_mlp(layer: LayerView, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a layer's MLP."""
    if not is_plain_mlp(layer, x):
        return layer.mlp(x)
    return linear_op(layer.down, swiglu(x, *packed_gate_up(layer)))


def _computable(module: nn.Module, dtype: torch.dtype, graph: bool) -> bool:
    """Return whether all parameters have a dtype, and are frozen where autograd records a graph.

    Iterating over `parameters()` takes ten times as long.
    """
    for p in module._parameters.values():
        if p is not None and (p.dtype != dtype or (graph and p.requires_grad)):
            return False
    children = module._modules
    return not children or all(_computable(c, dtype, graph) for c in children.values() if c is not None)
