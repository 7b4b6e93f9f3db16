"""Pickles that hold each weight once, where weights lie in blocks that several parameters share."""

from __future__ import annotations

from torch import nn

from icae_fast.core.memory import own_tensor


def with_own_weights(module: nn.Module) -> nn.Module:
    """Return a module like this one whose parameters have a storage each; the module itself stays as it is.

    `icae_fast.backbone` makes parameters views of a block, and a pickled view holds its whole block. Everything but
    these parameters is shared with the module.
    """
    return _twin(module, {})


def _twin(module: nn.Module, made: dict[int, nn.Parameter]) -> nn.Module:
    children = {name: child if child is None else _twin(child, made) for name, child in module._modules.items()}
    parameters = {name: _owned(p, made) for name, p in module._parameters.items()}
    changed = any(children[n] is not module._modules[n] for n in children)
    if not changed and all(parameters[n] is module._parameters[n] for n in parameters):
        return module
    twin = module.__new__(type(module))
    twin.__dict__.update(module.__dict__, _modules=children, _parameters=parameters)
    return twin


def _owned(p: nn.Parameter | None, made: dict[int, nn.Parameter]) -> nn.Parameter | None:
    if type(p) is not nn.Parameter:
        return p
    if id(p) not in made:  # tied weights stay tied
        values = own_tensor(p.detach())
        made[id(p)] = p if values.data_ptr() == p.data_ptr() else nn.Parameter(values, p.requires_grad)
    return made[id(p)]
