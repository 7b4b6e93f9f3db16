"""Whether calling a module does more than its class's forward, which is all that an op computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from icae_fast.backbone.families.view import LayerView
from icae_fast.errors import UnsupportedModelError

# Hooks that change nothing here: transformers leaves its recorder of hidden states on a model whose caller asked for
# these once, `icae_fast.backbone.sharding` gathers the weights that FSDP2's hooks would, and counters of operations
# note which module they are in.
_WITHOUT_EFFECT = (
    "transformers.utils.output_capturing", "transformers.utils.generic", "torch.distributed.fsdp",
    "torch.utils.module_tracker",
)  # fmt: skip


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own or all modules have, or its instance another forward."""
    return _has_hooks(module) or ("forward" in module.__dict__ and _is_replaced(module))


def check_projections(layer: LayerView) -> None:
    """Raise unless `lora_qkv_rope` and the attention ops compute what a layer's modules do.

    These ops stand for the layer's own forward, attention's, and those of q, k and v, so that none of these is called.

    Raises:
        UnsupportedModelError: a hook, a forward replaced on an instance, or a projection that is no plain `nn.Linear`.
    """
    for module in layer.qkv:
        if type(module) is not nn.Linear:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise UnsupportedModelError(
                f"{layer.name_of(module)} is a {kind}, and the ops compute plain torch.nn.Linear layers; remove what "
                "was put around it (an adapter by `unload()` or `merge_and_unload()`, a parametrization by "
                "`torch.nn.utils.parametrize.remove_parametrizations`)"
            )
    for module in (layer.module, layer.attention, *layer.qkv, *(layer.qk_norm or ())):
        if is_hooked(module):
            raise UnsupportedModelError(
                f"{layer.name_of(module) or 'a decoder layer'} ({type(module).__name__}) has hooks or a forward that "
                "was replaced, and the ops compute it without calling it; remove them, or hook the norms, o_proj or "
                "the MLP, which are called then"
            )


def _has_hooks(module: nn.Module) -> bool:
    kinds: Iterable[dict[int, Any]] = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
        torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks,
    )  # fmt: skip
    return any(kinds) and any(_has_effect(hook) for hooks in kinds for hook in hooks.values())


def _has_effect(hook: Callable[..., Any]) -> bool:
    return not (getattr(hook, "__module__", None) or "").startswith(_WITHOUT_EFFECT)


def _is_replaced(module: nn.Module) -> bool:
    """Return whether the forward of an instance is another than its class's, which libraries put back as it was."""
    forward = module.__dict__["forward"]
    return getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module


def is_frozen(modules: Iterable[nn.Module]) -> bool:
    """Return whether no parameter of modules requires a gradient, or autograd is off."""
    return not torch.is_grad_enabled() or not any(p.requires_grad for m in modules for p in m.parameters())
