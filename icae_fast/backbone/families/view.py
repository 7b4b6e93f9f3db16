"""Views of a Hugging Face causal language model by role, independent of the names its family gives to modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from icae_fast.backbone.families.types import CausalLM, Children, Decoder, RMSNorm

# RoPE types whose angles depend on the length of a row.
_CHANGING_ROPE = ("dynamic", "longrope")


class LayerView(ABC):
    """One decoder layer by role.

    Every property looks its module up on access, so a module that a user replaces or moves is used at once. Lookups go
    through `_modules`, because `nn.Module.__getattr__` takes ten times as long.

    The layer computes `x += o(attention(qkv(attention_norm(x))))` and `x += mlp(mlp_norm(x))`, with RMS norms in front
    of the sublayers. Projections have the type `nn.Linear` here, but o and those of the MLP may be other modules (e.g.
    quantised ones): `icae_fast.backbone.modules.is_plain_linear` checks that before an op reads them.

    Args:
        module: the decoder layer.
        config: the model's configuration.
        index: number of the layer, from 0.

    Attributes:
        window: sliding window in keys, the query's own included; 0 for none.
        rope: whether queries and keys are rotated.
    """

    __slots__ = ("module", "rope", "window")

    def __init__(self, module: nn.Module, config: Any, index: int) -> None:
        self.module = module
        self.window = self.window_of(config, index)
        self.rope = self.rope_of(config, index)

    @staticmethod
    def window_of(config: Any, index: int) -> int:
        """Return a layer's sliding window in keys, 0 for none."""
        types = getattr(config, "layer_types", None)
        return config.sliding_window or 0 if types and types[index] == "sliding_attention" else 0

    @staticmethod
    def rope_of(config: Any, index: int) -> bool:
        """Return whether a layer rotates its queries and keys."""
        return True

    def name_of(self, module: nn.Module) -> str:
        """Return the name of a module within the layer, for messages."""
        return next(name for name, m in self.module.named_modules() if m is module)

    @property
    @abstractmethod
    def attention_norm(self) -> RMSNorm:
        """RMS norm in front of attention."""

    @property
    @abstractmethod
    def mlp_norm(self) -> RMSNorm:
        """RMS norm in front of the MLP."""

    @property
    @abstractmethod
    def attention(self) -> nn.Module:
        """The attention module, which ops compute in parts and do not call."""

    @property
    @abstractmethod
    def qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Query, key and value projections."""

    @property
    @abstractmethod
    def qk_norm(self) -> tuple[RMSNorm, RMSNorm] | None:
        """RMS norms of query and key heads, each over one head; None for a model without them."""

    @property
    @abstractmethod
    def o(self) -> nn.Linear:
        """Output projection of attention."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Factor of the attention scores."""

    @property
    @abstractmethod
    def head_dim(self) -> int:
        """Elements of a head."""

    @property
    @abstractmethod
    def mlp(self) -> nn.Module:
        """The whole MLP, called where the ops do not compute it."""

    @property
    @abstractmethod
    def gate_up(self) -> tuple[nn.Linear, nn.Linear]:
        """Gate and up projections of an MLP whose `swiglu` is not None."""

    @property
    @abstractmethod
    def down(self) -> nn.Linear:
        """Last projection of the MLP."""

    @property
    @abstractmethod
    def swiglu(self) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
        """Gate, up and down projections of an MLP `down(silu(gate(x)) * up(x))`; None for any other MLP."""


class ModelView:
    """A causal language model by role.

    Args:
        model: the causal language model.
        layer_type: the family's view of a layer.

    Attributes:
        decoder: the model without its head.
    """

    def __init__(self, model: nn.Module, layer_type: type[LayerView]) -> None:
        self.model = cast(CausalLM, model)
        self.decoder: Decoder = self.model.model
        self._layer_type = layer_type
        self._views = [layer_type(module, self.model.config, i) for i, module in enumerate(self.layers)]

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.get_input_embeddings()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers' modules."""
        children: Children = self.decoder._modules
        return children["layers"]

    @property
    def final_norm(self) -> RMSNorm:
        """RMS norm behind the last layer."""
        children: Children = self.decoder._modules
        return children["norm"]

    @property
    def head(self) -> nn.Linear:
        """The output projection to the vocabulary."""
        return self.model.lm_head

    @property
    def rope_type(self) -> str:
        """Kind of RoPE scaling, `"default"` for none."""
        return getattr(self.decoder.rotary_emb, "rope_type", "default")

    @property
    def rope_limit(self) -> int | None:
        """The most positions of a row whose angles depend on the position alone; None for no limit.

        Beyond it, `dynamic` and `longrope` rotate all tokens of a row by angles that depend on its length. A row would
        then depend on the rows beside it, and kept keys on how long their row has become.
        """
        if self.rope_type not in _CHANGING_ROPE:
            return None
        config = self.model.config
        original = (getattr(config, "rope_parameters", None) or {}).get("original_max_position_embeddings")
        return int(original or config.max_position_embeddings)

    def layer(self, i: int, module: nn.Module | None = None) -> LayerView:
        """Return the view of layer i, made anew only after its module was replaced.

        Args:
            i: number of the layer.
            module: the layer's module, where the caller has it.
        """
        module = self.layers[i] if module is None else module
        view = self._views[i]
        if view.module is not module:
            view = self._views[i] = self._layer_type(module, self.model.config, i)
        return view

    def __iter__(self) -> Iterator[LayerView]:
        """Yield the view of every layer."""
        return (self.layer(i, module) for i, module in enumerate(self.layers))

    def rotary_tables(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin (T, D) of positions (T,) in `dtype`."""
        cos, sin = self.decoder.rotary_emb(positions.new_empty(0, dtype=dtype), positions[None])
        return cos[0], sin[0]
