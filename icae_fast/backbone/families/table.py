"""The table of supported model families."""

from __future__ import annotations

from typing import Any

from torch import nn

from icae_fast.backbone.families.llama import LlamaLayer
from icae_fast.backbone.families.ministral import MinistralLayer
from icae_fast.backbone.families.mistral import MistralLayer
from icae_fast.backbone.families.qwen import Qwen2Layer, Qwen3Layer
from icae_fast.backbone.families.smollm3 import SmolLM3Layer
from icae_fast.backbone.families.view import LayerView, ModelView

# `config.model_type` -> the family's view of a layer.
FAMILIES: dict[str, type[LayerView]] = {
    "llama": LlamaLayer,
    "ministral": MinistralLayer,
    "mistral": MistralLayer,
    "qwen2": Qwen2Layer,
    "qwen3": Qwen3Layer,
    "smollm3": SmolLM3Layer,
}


def view_of(model: nn.Module) -> ModelView:
    """Return the view of a causal language model whose `config.model_type` is in `FAMILIES`."""
    config: Any = model.config
    return ModelView(model, FAMILIES[config.model_type])
