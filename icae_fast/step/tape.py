"""The layer stack with a backward of its own, which says layer by layer what is kept and what is computed again.

Autograd keeps what each op asks for, 12 hidden states a token and layer of SmolLM2. Here a layer keeps by its `Level`
one, two or ten; the rest is computed again from the hidden state that the layer read, except for its last product
(a quarter of the layer's), whose result no gradient needs. What is kept of all layers lies in blocks made beforehand:
pieces kept one by one between a layer's temporaries hold the heap apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import torch

from icae_fast.backbone.lora import PackedLoRA
from icae_fast.backbone.rows import PackedRows
from icae_fast.ops import linear, rms_norm, varlen_attention
from icae_fast.ops._declare import Op
from icae_fast.ops.varlen_attention.backends import without_gradient

if TYPE_CHECKING:
    from icae_fast.backbone.stack import Backbone

_lora_qkv_rope, _swiglu = Op("lora_qkv_rope"), Op("swiglu")
_lora_qkv_rope_backward, _swiglu_backward = Op("lora_qkv_rope_backward"), Op("swiglu_backward")
_varlen_attention_backward, _rms_norm_backward = Op("varlen_attention_backward"), Op("rms_norm_backward")


class Level(IntEnum):
    """How much of a layer is kept for its backward."""

    NOTHING = 0  # the whole stack runs again
    HIDDEN = 1  # the hidden state that it reads
    ATTENTION = 2  # that and attention's result, whose cost grows with the square of the length
    ALL = 3  # everything but the results of norms


class _Rest(NamedTuple):
    """What `Level.ALL` keeps besides: q, k, v, the residual stream behind attention, and the gate-up product."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    middle: torch.Tensor
    gate_up: torch.Tensor


@dataclass
class StackTape:
    """What a forward left for its backward; it serves once.

    Args:
        backbone, rows, lora: of the forward; cos, sin: rotary tables.
        levels: of each layer.
        hidden: (layers, T, d); attended: (layers, T, Hq D) of those at `Level.ATTENTION` or above, by layer.
        lse, rest: by layer.
    """

    backbone: Backbone
    rows: PackedRows
    lora: Sequence[PackedLoRA] | None
    cos: torch.Tensor
    sin: torch.Tensor
    levels: Sequence[Level]
    hidden: torch.Tensor
    attended: dict[int, torch.Tensor]
    lse: dict[int, torch.Tensor]
    rest: dict[int, _Rest]


def kept_bytes(backbone: Backbone, level: Level, tokens: int, itemsize: int) -> int:
    """Bytes that one layer keeps of so many tokens.

    Args:
        backbone: gives sizes.
        level: how much is kept.
        tokens: T, of all packed rows.
        itemsize: bytes of an element.
    """
    b = backbone
    queries = b.num_q_heads * b.head_dim
    elements = b.hidden_size if level >= Level.HIDDEN else 0
    extra = 0
    if level >= Level.ATTENTION:
        elements, extra = elements + queries, 4 * b.num_q_heads
    if level >= Level.ALL:
        mlp = b.model.layers[0].mlp.gate_proj.out_features
        elements += queries + 2 * b.num_kv_heads * b.head_dim + b.hidden_size + 2 * mlp
    return tokens * (elements * itemsize + extra)


def forward_stack(
    backbone: Backbone,
    x: torch.Tensor,
    rows: PackedRows,
    lora: Sequence[PackedLoRA] | None,
    levels: Sequence[Level],
    *,
    offload: bool = False,
) -> tuple[torch.Tensor, StackTape]:
    """All layers without autograd, keeping what `levels` say.

    Args:
        backbone: its layers must be what `Backbone.is_plain_stack` accepts.
        x: (T, d) embeddings.
        rows: the layout.
        lora: each layer's factors, or None.
        levels: of each layer; all `NOTHING`, or none of them.
        offload: keep hidden states and attention's results in the host's memory.

    Returns:
        (Tq, d) hidden states before the final norm, and the tape.
    """
    n, t = backbone.n_layers, x.shape[0]
    place = {"device": "cpu", "pin_memory": x.is_cuda} if offload else {"device": x.device}
    cos, sin = backbone.rotary_tables(rows.positions, x)
    keeps = levels[0] > Level.NOTHING
    hidden = x.new_empty(n if keeps else 0, t, x.shape[1], **place)
    with_attention = [i for i, level in enumerate(levels) if level >= Level.ATTENTION]
    width = backbone.num_q_heads * backbone.head_dim
    attended = x.new_empty(len(with_attention), t, width, **place)
    tape = StackTape(
        backbone, rows, lora, cos, sin, levels, hidden, dict(zip(with_attention, attended, strict=True)), {}, {}
    )
    for i in range(n):
        if keeps:
            hidden[i].copy_(x, non_blocking=True)
        with backbone.whole(i, 1) as layer:
            x = _forward_layer(tape, i, layer, x)
    return x, tape


def _forward_layer(tape, i, layer, x):
    level = tape.levels[i]
    h, _ = _norm(layer.input_layernorm, x)
    q, k, v = _lora_qkv_rope(*_projection(tape, i, h))
    out, lse = _attend(tape, i, q, k, v)
    if level >= Level.ATTENTION:
        kept = tape.attended[i] = tape.attended[i][: len(out)]
        kept.copy_(out.flatten(1), non_blocking=True)
        tape.lse[i] = lse
    o_proj = layer.self_attn.o_proj
    projected = linear(out.flatten(1), o_proj.weight, o_proj.bias)
    h, middle = _norm(layer.post_attention_layernorm, projected, _queries(tape, i, x))
    weight, bias = tape.backbone.gate_up(layer)
    h, gate_up = _swiglu(h, weight, bias, level == Level.ALL)
    if level == Level.ALL:
        tape.rest[i] = _Rest(q, k, v, middle, gate_up)
        return middle + linear(h, layer.mlp.down_proj.weight, layer.mlp.down_proj.bias)
    return middle.add_(linear(h, layer.mlp.down_proj.weight, layer.mlp.down_proj.bias))


def backward_stack(tape: StackTape, grad: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The gradients of a forward that kept something.

    Args:
        tape: of `forward_stack`; it is used up.
        grad: (Tq, d) of the hidden states before the final norm.

    Returns:
        (T, d) gradient of the embeddings, and of each layer's factors: a of all layers, then b of all.
    """
    of_a, of_b = [], []
    for i in reversed(range(tape.backbone.n_layers)):
        with tape.backbone.whole(i, -1) as layer:
            grad, da, db = _backward_layer(tape, i, layer, grad)
        of_a.insert(0, da)
        of_b.insert(0, db)
    tape.hidden, tape.attended, tape.lse = tape.hidden[:0], {}, {}
    return grad, [*of_a, *of_b]


def _backward_layer(tape, i, layer, grad):
    attention, mlp = layer.self_attn, layer.mlp
    hidden = tape.hidden[i].to(grad.device, non_blocking=True)
    h, _ = _norm(layer.input_layernorm, hidden)
    projection = _projection(tape, i, h)
    rest = tape.rest.pop(i, None)
    q, k, v = rest[:3] if rest else _lora_qkv_rope(*projection)
    if i in tape.attended:
        out, lse = tape.attended.pop(i).to(grad.device, non_blocking=True).view_as(q), tape.lse.pop(i)
    else:
        out, lse = _attend(tape, i, q, k, v)
    if rest:
        normed = middle = rest.middle
        gate_up = rest.gate_up
    else:
        projected = linear(out.flatten(1), attention.o_proj.weight, attention.o_proj.bias)
        normed, middle = _norm(layer.post_attention_layernorm, projected, _queries(tape, i, hidden))
        gate_up = grad.new_empty(0)  # the op computes it again
    weight, bias = tape.backbone.gate_up(layer)
    # Of `normed` the op takes the values only where there is no gate-up product, and else the shape.
    dh = _swiglu_backward(linear(grad, mlp.down_proj.weight.t()), normed, weight, bias, gate_up)
    del gate_up, rest
    dmiddle = _norm_backward(layer.post_attention_layernorm, dh, grad, middle)
    dout = linear(dmiddle, attention.o_proj.weight.t()).view_as(out)
    dq, dk, dv = _varlen_attention_backward(
        dout, without_gradient(lse), q, k, v, out, lse, *_layout(tape, i), *_score(tape, i)
    )
    dh, da, db = _lora_qkv_rope_backward(dq, dk, dv, *projection)
    if len(dmiddle) < len(hidden):  # only some rows had queries; the others' stream ends here
        dmiddle = torch.zeros_like(hidden).index_copy_(0, tape.rows.out_rows, dmiddle)
    dx = _norm_backward(layer.input_layernorm, dh, dmiddle, hidden)
    return (dx, da, db) if tape.lora else (dx, None, None)


def _norm(module, x, residual=None):
    return rms_norm(x, module.weight, module.variance_epsilon, residual=residual)


def _norm_backward(module, dy, dsum, total):
    return _rms_norm_backward(dy, dsum, total, module.weight, module.variance_epsilon)


def _is_last(tape, i):
    return i == tape.backbone.n_layers - 1 and tape.rows.out_rows is not None


def _queries(tape, i, x):
    return x[tape.rows.out_rows] if _is_last(tape, i) else x


def _projection(tape, i, h):
    lora = tape.lora[i] if tape.lora else None
    out_rows = tape.rows.out_rows if _is_last(tape, i) else None
    return tape.backbone.projection(tape.backbone.model.layers[i], h, tape.cos, tape.sin, out_rows, lora)


def _layout(tape, i):
    """cu_seqlens of queries and keys, seqused, and the longest rows."""
    r = tape.rows
    if _is_last(tape, i):
        return r.cu_seqlens_out, r.cu_seqlens, None, r.max_seqlen_out, r.max_seqlen
    return r.cu_seqlens, r.cu_seqlens, None, r.max_seqlen, r.max_seqlen


def _score(tape, i):
    return tape.backbone.model.layers[i].self_attn.scaling, tape.backbone.windows[i]


def _attend(tape, i, q, k, v):
    cu_q, cu_k, _, max_q, max_k = _layout(tape, i)
    scale, window = _score(tape, i)
    return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window=window)
