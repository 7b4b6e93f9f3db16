"""Ministral: LLaMA with a sliding window in the layers that `layer_types` lists."""

from __future__ import annotations

from icae_fast.backbone.families.llama import LlamaLayer


class MinistralLayer(LlamaLayer):
    """A layer of Ministral: LLaMA without biases; every layer has full attention or a window.

    Source: `MinistralDecoderLayer` of transformers.
    """

    __slots__ = ()
