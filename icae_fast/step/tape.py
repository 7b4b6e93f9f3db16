"""The layer stack with an explicit backward, in which each layer keeps or recomputes activations by its `Level`.

Autograd keeps every tensor that an op saves, 12 hidden states a token and layer of SmolLM2. Here a layer keeps one, two
or ten. The rest is recomputed from the hidden state that the layer read, except its last product (a quarter of the
layer's work), whose result no gradient needs. The kept tensors of all layers lie in preallocated blocks, because
separate allocations between a layer's temporaries fragment the heap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import nn

from icae_fast.backbone.families.types import RMSNorm
from icae_fast.backbone.families.view import LayerView
from icae_fast.backbone.layer import QKV, StackPass, forward_layer
from icae_fast.backbone.lora import PackedLoRA
from icae_fast.backbone.modules import linear_op, norm_op
from icae_fast.backbone.packing import packed_gate_up
from icae_fast.backbone.rows import PackedRows
from icae_fast.backbone.stack import Backbone
from icae_fast.ops import linear, varlen_attention
from icae_fast.ops._declare import Op
from icae_fast.ops.varlen_attention.backends import without_gradient

_lora_qkv_rope, _swiglu = Op("lora_qkv_rope"), Op("swiglu")
_lora_qkv_rope_backward, _swiglu_backward = Op("lora_qkv_rope_backward"), Op("swiglu_backward")
_varlen_attention_backward, _rms_norm_backward = Op("varlen_attention_backward"), Op("rms_norm_backward")

LayerGradients = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Level(IntEnum):
    """How much of a layer is kept for its backward."""

    NOTHING = 0  # the whole stack runs again
    HIDDEN = 1  # the hidden state that it reads
    ATTENTION = 2  # that and attention's result, whose cost grows with the square of the length
    ALL = 3  # everything except the results of norms


class _Rest(NamedTuple):
    """Tensors kept by `Level.ALL` only: q, k, v, the residual stream behind attention, and the gate-up product."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    middle: torch.Tensor
    gate_up: torch.Tensor


@dataclass(kw_only=True)
class StackTape(StackPass):
    """A forward without autograd, and the tensors that it keeps for one backward.

    Args:
        backbone: the layer stack.
        levels: how much each layer keeps.
        hidden: (layers, T, d) hidden states that the layers read.
        attended: (T, Hq D) attention results of the layers at `Level.ATTENTION` or above, by layer.
        lse: log-sum-exps of attention, by layer.
        rest: see `_Rest`, by layer.
    """

    backbone: Backbone
    levels: Sequence[Level]
    hidden: torch.Tensor
    attended: dict[int, torch.Tensor]
    lse: dict[int, torch.Tensor] = field(default_factory=dict)
    rest: dict[int, _Rest] = field(default_factory=dict)
    _qkv: dict[int, QKV] = field(default_factory=dict)
    _gate_up: dict[int, torch.Tensor] = field(default_factory=dict)

    def norm(
        self, module: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return norm_op(module, x, residual)

    def project(self, i: int, layer: LayerView, h: torch.Tensor) -> QKV:
        return _lora_qkv_rope(*self.projection(i, layer, h))

    def attend(self, i: int, layer: LayerView, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = self.attend_again(i, layer, q, k, v)
        if self.levels[i] >= Level.ATTENTION:
            kept = self.attended[i] = self.attended[i][: len(out)]
            kept.copy_(out.flatten(1), non_blocking=True)
            self.lse[i] = lse
        if self.levels[i] == Level.ALL:
            self._qkv[i] = q, k, v
        return out

    def linear(self, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return linear_op(module, x)

    def mlp(self, i: int, layer: LayerView, x: torch.Tensor) -> torch.Tensor:
        keep = self.levels[i] == Level.ALL
        h, gate_up = _swiglu(x, *packed_gate_up(layer), keep)
        if keep:
            self._gate_up[i] = gate_up
        return linear_op(layer.down, h)

    def finish(self, i: int, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the hidden states behind layer i, from the two results of `forward_layer`."""
        if self.levels[i] == Level.ALL:
            self.rest[i] = _Rest(*self._qkv.pop(i), residual, self._gate_up.pop(i))
            return residual + x
        return residual.add_(x)

    def attend_again(
        self, i: int, layer: LayerView, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return layer i's attention and its log-sum-exp, keeping neither."""
        return varlen_attention(q, k, v, *self.layout(i), scale=layer.scale, window=self.windows[i])

    def queries(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of x (T, d) that layer i computes queries for."""
        out_rows = self.out_rows(i)
        return x if out_rows is None else x[out_rows]


def kept_bytes(backbone: Backbone, level: Level, tokens: int, itemsize: int) -> int:
    """Return the bytes that one layer keeps.

    Args:
        backbone: the layer stack, for its sizes.
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
        mlp = b.view.layer(0).gate_up[0].out_features
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
    """Run all layers without autograd, keeping what `levels` say.

    Args:
        backbone: a stack that `Backbone.is_plain_stack` accepts.
        x: (T, d) embeddings.
        rows: row boundaries and positions.
        lora: factors of each layer, or None.
        levels: level of each layer; either all are `NOTHING` or none is.
        offload: keep hidden states and attention's results in host memory.

    Returns:
        (Tq, d) hidden states before the final norm, and the tape.
    """
    n, t = backbone.n_layers, x.shape[0]
    place = {"device": "cpu", "pin_memory": x.is_cuda} if offload else {"device": x.device}
    keeps = levels[0] > Level.NOTHING
    hidden = x.new_empty(n if keeps else 0, t, x.shape[1], **place)
    with_attention = [i for i, level in enumerate(levels) if level >= Level.ATTENTION]
    attended = x.new_empty(len(with_attention), t, backbone.num_q_heads * backbone.head_dim, **place)
    tape = backbone.new_pass(
        StackTape, x, rows, lora, backbone=backbone, levels=levels, hidden=hidden,
        attended=dict(zip(with_attention, attended, strict=True)),
    )  # fmt: skip
    for i in range(n):
        if keeps:
            hidden[i].copy_(x, non_blocking=True)
        with backbone.whole(i, 1) as module:
            x = tape.finish(i, *forward_layer(tape, i, backbone.view.layer(i, module), x, None))
    return x, tape


def backward_stack(tape: StackTape, grad: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the gradients of a forward that kept something.

    Args:
        tape: of `forward_stack`; it serves once.
        grad: (Tq, d) gradient of the hidden states before the final norm.

    Returns:
        (T, d) gradient of the embeddings, and of each layer's factors: a of all layers, then b of all layers.
    """
    backbone = tape.backbone
    of_a: list[torch.Tensor | None] = []
    of_b: list[torch.Tensor | None] = []
    for i in reversed(range(backbone.n_layers)):
        with backbone.whole(i, -1) as module:
            grad, da, db = _backward_layer(tape, i, backbone.view.layer(i, module), grad)
        of_a.insert(0, da)
        of_b.insert(0, db)
    tape.hidden, tape.attended, tape.lse = tape.hidden[:0], {}, {}
    return grad, [*of_a, *of_b]


def _backward_layer(tape: StackTape, i: int, layer: LayerView, grad: torch.Tensor) -> LayerGradients:
    hidden = tape.hidden[i].to(grad.device, non_blocking=True)
    h, _ = tape.norm(layer.attention_norm, hidden)
    projection = tape.projection(i, layer, h)
    rest = tape.rest.pop(i, None)
    q, k, v = rest[:3] if rest else _lora_qkv_rope(*projection)
    if i in tape.attended:
        out, lse = tape.attended.pop(i).to(grad.device, non_blocking=True).view_as(q), tape.lse.pop(i)
    else:
        out, lse = tape.attend_again(i, layer, q, k, v)
    if rest:
        normed = middle = rest.middle
        gate_up = rest.gate_up
    else:
        projected = tape.linear(layer.o, out.flatten(1))
        normed, middle = tape.norm(layer.mlp_norm, projected, tape.queries(i, hidden))
        gate_up = grad.new_empty(0)  # the op computes it again
    weight, bias = packed_gate_up(layer)
    # The op reads the values of `normed` only without a gate-up product, and otherwise its shape.
    dh = _swiglu_backward(linear(grad, layer.down.weight.t()), normed, weight, bias, gate_up)
    del gate_up, rest
    dmiddle = _norm_backward(layer.mlp_norm, dh, grad, middle)
    dout = linear(dmiddle, layer.o.weight.t()).view_as(out)
    cu_q, cu_k, max_q, max_k = tape.layout(i)
    dq, dk, dv = _varlen_attention_backward(
        dout, without_gradient(lse), q, k, v, out, lse, cu_q, cu_k, None, max_q, max_k, layer.scale, tape.windows[i]
    )
    dh, da, db = _lora_qkv_rope_backward(dq, dk, dv, *projection)
    out_rows = tape.rows.out_rows
    # Where only some rows have queries, the residual stream of the others ends here.
    if out_rows is not None and len(dmiddle) < len(hidden):
        dmiddle = torch.zeros_like(hidden).index_copy_(0, out_rows, dmiddle)
    dx = _norm_backward(layer.attention_norm, dh, dmiddle, hidden)
    return (dx, da, db) if tape.lora else (dx, None, None)


def _norm_backward(module: RMSNorm, dy: torch.Tensor, dsum: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return _rms_norm_backward(dy, dsum, total, module.weight, module.variance_epsilon)
