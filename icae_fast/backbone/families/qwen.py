"""Qwen2 and Qwen3."""

from __future__ import annotations

from torch import nn

from icae_fast.backbone.families.llama import LlamaLayer


class Qwen2Layer(LlamaLayer):
    """A layer of Qwen2: LLaMA with biases on q, k and v, and a window in the layers that `layer_types` lists.

    Source: `Qwen2DecoderLayer` of transformers.
    """

    __slots__ = ()


class Qwen3Layer(LlamaLayer):
    """A layer of Qwen3: q and k are normalised over each head before RoPE.

    Source: `Qwen3DecoderLayer` of transformers.
    """

    __slots__ = ()

    @property
    def qk_norm(self) -> tuple[nn.Module, nn.Module] | None:
        attention = self.module._modules["self_attn"]._modules
        return attention["q_norm"], attention["k_norm"]
