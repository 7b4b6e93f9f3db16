"""The check of whether a model can be run by `Backbone`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icae_fast.backbone.families.table import FAMILIES, view_of
from icae_fast.backbone.families.view import ModelView
from icae_fast.errors import UnsupportedModelError
from icae_fast.ops import REGISTRY, backend_of


def check_supported(model: nn.Module) -> None:
    """Raise unless `Backbone` computes a model exactly.

    Raises:
        UnsupportedModelError: another architecture, quantised, wrapped, offloaded or spread weights in any layer,
            attention dropout, or a dtype that the kernels of its device do not take.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            "the base model carries PEFT adapters; pass the model that `model.unload()` or `model.merge_and_unload()` "
            "returns"
        )
    if kind not in FAMILIES or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"base models of type {kind!r} are not supported; use a causal language model of one of the types "
            f"{', '.join(FAMILIES)}"
        )
    view = view_of(model)
    _check_layers(view, model.config)
    _check_weights(model, view.embedding.weight)
    _check_dtype(view.embedding)
    if getattr(model.config, "attention_dropout", 0.0):
        raise UnsupportedModelError("the base model has attention dropout; load it with attention_dropout=0.0")


def _check_dtype(embedding: nn.Embedding) -> None:
    dtype, device = embedding.weight.dtype, embedding.weight.device
    backend = backend_of("lora_qkv_rope", device)
    dtypes = REGISTRY["lora_qkv_rope"].dtypes[backend]
    if dtype not in dtypes:
        names = ", ".join(map(_name, dtypes))
        raise UnsupportedModelError(
            f"the base model is in {_name(dtype)}, which the {backend} kernels do not take on "
            f"{device.type}; load it in one of {names}"
        )


def _check_layers(view: ModelView, config: Any) -> None:
    """Raise unless q, k and v of every layer are plain linear layers in the compute dtype."""
    if len(view.layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"the base model has {len(view.layers)} layers and its config says {config.num_hidden_layers}; load it "
            "again, or set config.num_hidden_layers"
        )
    dtype = view.embedding.weight.dtype
    for i, layer in enumerate(view):
        for module in layer.qkv:
            name = f"{layer.name_of(module)} of layer {i}"
            if type(module) is not nn.Linear:
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__}; load the base model unquantised, with plain nn.Linear layers"
                )
            if module.weight.dtype != dtype:
                raise UnsupportedModelError(
                    f"{name} is in {_name(module.weight.dtype)} and the embedding in {_name(dtype)}; load the base "
                    "model in one dtype"
                )


def _check_weights(model: nn.Module, embedding: torch.Tensor) -> None:
    """Raise if a weight is elsewhere than in the memory of the model's device, or no plain tensor."""
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise UnsupportedModelError(
                f"{name} has no values here: it is offloaded, or was never loaded; load the whole base model, without "
                "device_map and without offloading"
            )
        if weight.device != embedding.device:
            raise UnsupportedModelError(
                f"{name} is on {weight.device} and the embedding on {embedding.device}; load the base model on one "
                "device, without device_map"
            )
        if _is_quantised(weight):
            raise UnsupportedModelError(
                f"{name} is a {type(weight.data).__name__}; load the base model unquantised, with plain tensors"
            )


def _is_quantised(weight: torch.Tensor) -> bool:
    """Return whether a weight is a tensor of a subclass, as those of torchao are; FSDP2's are plain once gathered."""
    return type(weight.data) is not torch.Tensor and not hasattr(weight, "to_local")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
