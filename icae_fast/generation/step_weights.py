"""The frozen model's weights as `decode_step` takes them, and the rotary tables of a decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from icae_fast.backbone.arena import gather_weights
from icae_fast.backbone.sharding import is_sharded
from icae_fast.backbone.stack import Backbone, is_plain, packed, packed_qkv, qk_norms
from icae_fast.ops import backend_of

# Those whose angles depend on how long a row has become.
_CHANGING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class StepWeights:
    """Views of the Hugging Face modules' weights; see `icae_fast.ops.decode_step` for what is what."""

    embedding: torch.Tensor
    norms: list[torch.Tensor]
    matrices: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    qk_norms: list[torch.Tensor | None]
    head: torch.Tensor
    scale: float
    norm_eps: float
    windows: list[int]

    @classmethod
    def of(cls, model: nn.Module, backbone: Backbone) -> StepWeights | None:
        """The weights, or None where `decode_step` does not compute what the model's modules do.

        That is so for activations other than SiLU, hooks, weights in several dtypes, with a gradient or sharded, a
        head with a bias, and devices for which there is no kernel of the whole step.
        """
        embedding, head, layers = model.get_input_embeddings(), model.lm_head, model.model.layers
        like = embedding.weight
        if backend_of("decode_step", like.device) == "reference" or type(embedding) is not nn.Embedding:
            return None
        modules = [embedding, head, model.model.norm]
        for layer in layers:
            if is_sharded(layer) or not backbone.is_silu(layer.mlp):
                return None
            modules += [layer.input_layernorm, layer.post_attention_layernorm, *_linears(layer), *_head_norms(layer)]
        linears = [head, *(linear for layer in layers for linear in _linears(layer))]
        plain = all(is_plain(m, like) for m in modules) and all(type(m) is nn.Linear for m in linears)
        biased = any((layer.mlp.gate_proj.bias is None) != (layer.mlp.up_proj.bias is None) for layer in layers)
        epsilons = {m.variance_epsilon for m in modules if hasattr(m, "variance_epsilon")}
        scales = {layer.self_attn.scaling for layer in layers}
        if not plain or biased or head.bias is not None or len(epsilons) != 1 or len(scales) != 1:
            return None
        if backend_of("decode_step", like.device) == "cpp":
            gather_weights(model)
        products = [p for layer in layers for p in _products(layer)]
        norms = [m.weight for layer in layers for m in (layer.input_layernorm, layer.post_attention_layernorm)]
        return cls(
            embedding=like.detach(),
            norms=[w.detach() for w in (*norms, model.model.norm.weight)],
            matrices=[w.detach() for w, _ in products],
            biases=[None if b is None else b.detach() for _, b in products],
            qk_norms=[qk_norms(layer.self_attn) for layer in layers],
            head=head.weight.detach(),
            scale=scales.pop(),
            norm_eps=epsilons.pop(),
            windows=backbone.windows,
        )


def _linears(layer):
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    ]  # fmt: skip


def _head_norms(layer):
    return [getattr(layer.self_attn, name) for name in ("q_norm", "k_norm") if hasattr(layer.self_attn, name)]


def _products(layer):
    attention, mlp = layer.self_attn, layer.mlp
    yield packed_qkv(attention)
    yield attention.o_proj.weight, attention.o_proj.bias
    yield packed((mlp.gate_proj, mlp.up_proj))
    yield mlp.down_proj.weight, mlp.down_proj.bias


class RotaryTables:
    """Cosines and sines of every position that a decoding can reach, made once.

    Args:
        backbone: of the frozen decoder.
        n_positions: positions 0 up to this one.
        like: a tensor of the model's dtype and device.

    Attributes:
        fixed: cos and sin (n_positions, D / 2) in the compute type, None where they depend on how long a row is.
    """

    def __init__(self, backbone: Backbone, n_positions: int, like: torch.Tensor) -> None:
        self._backbone, self._like = backbone, like
        self.fixed: tuple[torch.Tensor, torch.Tensor] | None = None
        if getattr(backbone.model.rotary_emb, "rope_type", "default") not in _CHANGING_ROPE:
            self.fixed = backbone.rotary_tables(torch.arange(n_positions, device=like.device), like)

    def at(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (len(positions), D / 2) in the compute type, computed for rows as long as these are now."""
        return self._backbone.rotary_tables(torch.tensor(positions, device=self._like.device), self._like)
