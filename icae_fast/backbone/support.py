"""The check of whether a model can be run by `Backbone`."""

from __future__ import annotations

from torch import nn

from icae_fast.backbone.families.table import FAMILIES, view_of
from icae_fast.errors import UnsupportedModelError
from icae_fast.ops import REGISTRY, backend_of


def check_supported(model: nn.Module) -> None:
    """Raise unless `Backbone` computes a model exactly.

    Raises:
        UnsupportedModelError: another architecture, quantised or wrapped projections, attention dropout, or a dtype
            that the kernels of its device do not take.
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
    layer = view.layer(0)
    for module in layer.qkv:
        if type(module) is not nn.Linear:
            raise UnsupportedModelError(
                f"{layer.name_of(module)} is a {type(module).__name__}; load the base model unquantised, with plain "
                "nn.Linear layers"
            )
    _check_dtype(view.embedding)
    if getattr(model.config, "attention_dropout", 0.0):
        raise UnsupportedModelError("the base model has attention dropout; load it with attention_dropout=0.0")


def _check_dtype(embedding: nn.Embedding) -> None:
    dtype, device = embedding.weight.dtype, embedding.weight.device
    backend = backend_of("lora_qkv_rope", device)
    dtypes = REGISTRY["lora_qkv_rope"].dtypes[backend]
    if dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise UnsupportedModelError(
            f"the base model is in {str(dtype).removeprefix('torch.')}, which the {backend} kernels do not take on "
            f"{device.type}; load it in one of {names}"
        )
