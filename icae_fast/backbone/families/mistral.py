"""Mistral: LLaMA with a sliding window."""

from __future__ import annotations

from typing import Any

from icae_fast.backbone.families.llama import LlamaLayer


class MistralLayer(LlamaLayer):
    """A layer of Mistral 7B, whose window holds for all layers unless the configuration lists `layer_types`.

    Source: Jiang et al., arXiv 2310.06825; `MistralDecoderLayer` of transformers.
    """

    __slots__ = ()

    @staticmethod
    def window_of(config: Any, index: int) -> int:
        if getattr(config, "layer_types", None):
            return LlamaLayer.window_of(config, index)
        return config.sliding_window or 0
