"""Sizes of a base model, and the bytes that one decode step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from icae_fast.backbone.families.table import view_of


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaMA-like base model.

    Args:
        name: the model's name in results.
        hidden_size, layers, q_heads, kv_heads, head_dim, mlp, vocabulary: its sizes.
        bundled: whether it is the real SmolLM2, which needs no hub; other models get random weights.
    """

    name: str
    hidden_size: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    bundled: bool = False

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Return the shape of a Hugging Face causal language model."""
        c = model.config
        head_dim = view_of(model).layer(0).head_dim
        return cls(
            c._name_or_path or c.model_type, c.hidden_size, c.num_hidden_layers, c.num_attention_heads,
            c.num_key_value_heads, head_dim, c.intermediate_size, c.vocab_size,
        )  # fmt: skip

    def layer_weights(self) -> int:
        """Return the elements of one layer's matrices."""
        attention = self.hidden_size * self.head_dim * (2 * self.q_heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden_size * self.mlp

    def decode_weights(self) -> int:
        """Return the elements of all matrices that a decode step reads: the layers' and the head's."""
        return self.layers * self.layer_weights() + self.hidden_size * self.vocabulary

    def kv_elements(self) -> int:
        """Return the elements of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim
