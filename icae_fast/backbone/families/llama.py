"""LLaMA, whose module names most other families share."""

from __future__ import annotations

from typing import Any

from torch import nn

from icae_fast.backbone.families.types import Children, RMSNorm
from icae_fast.backbone.families.view import LayerView

_SILU = ("SiLU", "SiLUActivation")


class LlamaLayer(LayerView):
    """A layer of LLaMA 1 to 3, and the base class of families with the same module names.

    Source: `LlamaDecoderLayer` of transformers.
    """

    __slots__ = ()

    @property
    def attention_norm(self) -> RMSNorm:
        children: Children = self.module._modules
        return children["input_layernorm"]

    @property
    def mlp_norm(self) -> RMSNorm:
        children: Children = self.module._modules
        return children["post_attention_layernorm"]

    @property
    def attention(self) -> nn.Module:
        children: Children = self.module._modules
        return children["self_attn"]

    @property
    def qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        children: Children = self.module._modules
        attention: Children = children["self_attn"]._modules
        return attention["q_proj"], attention["k_proj"], attention["v_proj"]

    @property
    def qk_norm(self) -> tuple[RMSNorm, RMSNorm] | None:
        return None

    @property
    def o(self) -> nn.Linear:
        children: Children = self.module._modules
        return children["self_attn"]._modules["o_proj"]

    @property
    def scale(self) -> float:
        children: Children = self.module._modules
        return children["self_attn"].scaling

    @property
    def head_dim(self) -> int:
        children: Children = self.module._modules
        return children["self_attn"].head_dim

    @property
    def mlp(self) -> nn.Module:
        children: Children = self.module._modules
        return children["mlp"]

    @property
    def gate_up(self) -> tuple[nn.Linear, nn.Linear]:
        children: Children = self.module._modules
        parts: Children = children["mlp"]._modules
        return parts["gate_proj"], parts["up_proj"]

    @property
    def down(self) -> nn.Linear:
        children: Children = self.module._modules
        return children["mlp"]._modules["down_proj"]

    @property
    def swiglu(self) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
        children: Children = self.module._modules
        parts: Children = children["mlp"]._modules
        if type(parts.get("act_fn")).__name__ not in _SILU:
            return None
        linears: Any = parts.get("gate_proj"), parts.get("up_proj"), parts.get("down_proj")
        return linears if all(type(m) is nn.Linear for m in linears) else None
