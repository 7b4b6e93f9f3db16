"""SmolLM3: some layers have no RoPE."""

from __future__ import annotations

from typing import Any

from icae_fast.backbone.families.llama import LlamaLayer


class SmolLM3Layer(LlamaLayer):
    """A layer of SmolLM3: LLaMA, with RoPE only where `no_rope_layers` holds 1.

    Source: `SmolLM3DecoderLayer` of transformers.
    """

    __slots__ = ()

    @staticmethod
    def window_of(config: Any, index: int) -> int:
        return LlamaLayer.window_of(config, index) if config.use_sliding_window else 0

    @staticmethod
    def rope_of(config: Any, index: int) -> bool:
        return bool(config.no_rope_layers[index])
