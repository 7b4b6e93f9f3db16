"""The frozen model's weights, and keys and values of decoder rows, as `decode_step` takes them."""

from __future__ import annotations

import torch
from torch import nn

from icae_fast.backbone.arena import gather_weights
from icae_fast.backbone.families.view import LayerView
from icae_fast.backbone.hooks import is_hooked
from icae_fast.backbone.modules import is_plain
from icae_fast.backbone.packing import packed_gate_up, packed_qkv, qk_norm_weights
from icae_fast.backbone.sharding import is_sharded
from icae_fast.backbone.stack import Backbone
from icae_fast.kv.segments import DecoderRows
from icae_fast.ops import StepCache, StepWeights, backend_of


def step_weights(backbone: Backbone) -> StepWeights | None:
    """Return the weights of a token step, or None where `decode_step` does not compute what the model's modules do.

    It does not for activations other than SiLU, layers without RoPE, hooks, weights in several dtypes, sharded weights,
    parameters that require a gradient, a head with a bias, and devices without a kernel of the whole step. Decoding
    then runs the stack layer by layer.
    """
    view = backbone.view
    like = view.embedding.weight
    if backend_of("decode_step", like.device) == "reference" or not _fits(backbone):
        return None
    if backend_of("decode_step", like.device) == "cpp":
        gather_weights(view.model)
    layers = list(view)
    products = [p for layer in layers for p in _products(layer)]
    norms = [m.weight for layer in layers for m in (layer.attention_norm, layer.mlp_norm)]
    return StepWeights(
        embedding=like.detach(),
        norms=[w.detach() for w in (*norms, view.final_norm.weight)],
        matrices=[w.detach() for w, _ in products],
        biases=[None if b is None else b.detach() for _, b in products],
        qk_norms=[qk_norm_weights(layer) for layer in layers],
        head=view.head.weight.detach(),
        num_q_heads=backbone.num_q_heads,
        num_kv_heads=backbone.num_kv_heads,
        scale=layers[0].scale,
        norm_eps=view.final_norm.variance_epsilon,
        windows=backbone.windows,
    )


def _fits(backbone: Backbone) -> bool:
    """Return whether the formula of `decode_step` is what the model's modules compute."""
    view = backbone.view
    layers, head, like = list(view), view.head, view.embedding.weight
    if type(view.embedding) is not nn.Embedding or not backbone.all_rope:
        return False
    if any(is_sharded(layer.module) or layer.swiglu is None for layer in layers):
        return False
    if any(is_hooked(m) for layer in layers for m in (layer.module, layer.attention, layer.mlp)):
        return False
    linears = [head, *(m for layer in layers for m in (*layer.qkv, layer.o, *layer.gate_up, layer.down))]
    norms = [view.final_norm]
    for layer in layers:
        norms += (layer.attention_norm, layer.mlp_norm, *(layer.qk_norm or ()))
    plain = all(is_plain(m, like) for m in (view.embedding, *linears, *norms))
    if not plain or any(type(m) is not nn.Linear for m in linears) or head.bias is not None:
        return False
    if any((gate.bias is None) != (up.bias is None) for gate, up in (layer.gate_up for layer in layers)):
        return False
    epsilons = {getattr(m, "variance_epsilon", None) for m in norms}
    return len(epsilons) == 1 and None not in epsilons and len({layer.scale for layer in layers}) == 1


def _products(layer: LayerView) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return weight and bias of a layer's four products, in the order of `StepWeights.matrices`."""
    down = layer.down
    return [packed_qkv(layer), (layer.o.weight, layer.o.bias), packed_gate_up(layer), (down.weight, down.bias)]


def step_cache(rows: DecoderRows) -> StepCache:
    """Return the keys and values of decoder rows as `decode_step` takes them."""
    shared = rows.shared
    return StepCache(
        rows.keys, rows.values, [s.keys for s in shared.segments], [s.values for s in shared.segments], shared.rows
    )
