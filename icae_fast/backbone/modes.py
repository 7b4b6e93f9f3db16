"""Modes of torch that a caller may have set, and that the ops' path computes without."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import nn

from icae_fast.backbone.forks import check_process

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class OnDevice(Protocol):
    """Anything with a device."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""


Model = TypeVar("Model", bound=OnDevice)


def in_own_modes(
    function: Callable[Concatenate[Model, Arguments], Result],
) -> Callable[Concatenate[Model, Arguments], Result]:
    """Make a function compute the same in every mode of its caller.

    * `torch.autocast`: off. The base model's dtype is the compute dtype; autocast would narrow some products only.
    * `torch.inference_mode`: `no_grad` instead. What a call leaves behind (memories, packed weights, merged weights)
      serves training later, and tensors of inference mode do not.
    * `torch.compile`: the function runs as it is, between two graphs. Its ops are kernels already, and its spans and
      rows have other shapes in every call.

    In a forked process it computes with one thread (`icae_fast.backbone.forks`).

    Args:
        function: its first argument has a device.
    """
    uncompiled: list[Callable[..., Result]] = []

    @functools.wraps(function)
    def call(first: Model, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return call(first, *args, **kwargs)
        check_process(first.device)
        if not torch.is_autocast_enabled(first.device.type):
            return function(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    @functools.wraps(function)
    def outer(first: Model, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # Importing dynamo takes a second, so the call is taken out of its reach only where it has been imported.
        if "torch._dynamo" not in sys.modules:
            return call(first, *args, **kwargs)
        if not uncompiled:
            uncompiled.append(torch.compiler.disable(call))
        return uncompiled[0](first, *args, **kwargs)

    return outer


def without_inference_tensors(model: nn.Module) -> None:
    """Replace parameters and buffers that were made in inference mode by normal ones, one at a time.

    Autograd could not save such weights, and no call outside of inference mode could pack them.
    """
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.is_inference():
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(_normal(p), requires_grad=p.requires_grad)
                module._parameters[name] = cast(nn.Parameter, made[id(p)])
        for name, b in list(module._buffers.items()):
            if b is not None and b.is_inference():
                module._buffers[name] = _normal(b)


@torch.inference_mode(False)
@torch.no_grad()
def _normal(x: torch.Tensor) -> torch.Tensor:
    return x.clone()
