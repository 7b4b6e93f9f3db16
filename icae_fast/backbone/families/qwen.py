"""Qwen2 and Qwen3."""

from __future__ import annotations

from icae_fast.backbone.families.llama import LlamaLayer
from icae_fast.backbone.families.types import Children, RMSNorm


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
    def qk_norm(self) -> tuple[RMSNorm, RMSNorm] | None:
        children: Children = self.module._modules
        attention: Children = children["self_attn"]._modules
        return attention["q_norm"], attention["k_norm"]
