"""The forward of one decoder layer over packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from icae_fast.backbone.families.types import RMSNorm
from icae_fast.backbone.families.view import LayerView
from icae_fast.backbone.hooks import is_frozen
from icae_fast.backbone.lora import MergedQKV, PackedLoRA
from icae_fast.backbone.modules import apply_linear, apply_mlp, apply_norm
from icae_fast.backbone.packing import packed_qkv, qk_norm_weights
from icae_fast.backbone.rows import PackedRows
from icae_fast.errors import BackendError
from icae_fast.ops import varlen_attention
from icae_fast.ops._declare import Op

_LORA_QKV_ROPE = Op("lora_qkv_rope")

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin


class KeyValueCache(Protocol):
    """A cache of keys and values that the stack reads and appends to, e.g. `icae_fast.kv.segments.DecoderRows`."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, scale: float,
        window: int,
    ) -> torch.Tensor:  # fmt: skip
        """Append the keys and values of the rows announced last, and attend to all that these rows have read."""


@dataclass(kw_only=True)
class StackPass:
    """Everything that the layers of one forward share, and how a layer computes each of its steps.

    This class computes a module by an op where it can, and calls the module otherwise. `icae_fast.step.tape` overrides
    the steps to keep what its backward needs.

    Args:
        rows: row boundaries, positions, and which final hidden states are requested.
        tables: RoPE tables (T, D / 2): cos = 1 and sin = 0 for layers without RoPE, and those for layers with RoPE.
        heads: numbers of query heads and of key and value heads, Hq and Hkv.
        windows: sliding window of each layer in keys, 0 for none.
        lora: packed LoRA or merged weights of each layer, or None (frozen decoder).
        cache: keys and values that the rows have read before, or None.
    """

    rows: PackedRows
    tables: tuple[Tables, Tables]
    heads: tuple[int, int]
    windows: Sequence[int]
    lora: Sequence[PackedLoRA] | Sequence[MergedQKV] | None
    cache: KeyValueCache | None = None

    def out_rows(self, i: int) -> torch.Tensor | None:
        """Return the rows (Tq,) that layer i computes queries for, None for all."""
        return self.rows.out_rows if i == len(self.windows) - 1 else None

    def projection(self, i: int, layer: LayerView, h: torch.Tensor) -> tuple:
        """Return the arguments of the op `lora_qkv_rope` for layer i, in its schema's order."""
        weight, bias = packed_qkv(layer)
        lora = self.lora[i] if self.lora else None
        if isinstance(lora, MergedQKV):
            weight, lora = lora.weight, None
        a, b, scale, p, seed = lora.parts if lora else (None, None, 0.0, 0.0, None)
        qk_norm = layer.qk_norm
        eps = 0.0 if qk_norm is None else qk_norm[0].variance_epsilon
        return (
            h, weight, bias, a, b, *self.tables[layer.rope], qk_norm_weights(layer), self.out_rows(i), seed,
            *self.heads, scale, eps, p,
        )  # fmt: skip

    def layout(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Return cu_seqlens of layer i's queries and of its keys, and the longest row of each."""
        r = self.rows
        cu_seqlens_out = r.cu_seqlens_out
        if cu_seqlens_out is None or self.out_rows(i) is None:
            return r.cu_seqlens, r.cu_seqlens, r.max_seqlen, r.max_seqlen
        return cu_seqlens_out, r.cu_seqlens, r.max_seqlen_out, r.max_seqlen

    def norm(
        self, module: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of `residual + x`, and that sum."""
        return apply_norm(module, x, residual)

    def project(self, i: int, layer: LayerView, h: torch.Tensor) -> QKV:
        """Return queries (Tq, Hq, D), keys and values (T, Hkv, D) of layer i."""
        arguments = self.projection(i, layer, h)
        _check_frozen(layer)
        return _LORA_QKV_ROPE(*arguments)

    def attend(self, i: int, layer: LayerView, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return layer i's attention (Tq, Hq, D), over the cache too where there is one."""
        cu_q, cu_k, max_q, max_k = self.layout(i)
        if self.cache is not None:
            return self.cache.attend(i, q, k, v, cu_q, layer.scale, self.windows[i])
        return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale=layer.scale, window=self.windows[i])[0]

    def linear(self, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """Return a linear module's product."""
        return apply_linear(module, x)

    def mlp(self, i: int, layer: LayerView, x: torch.Tensor) -> torch.Tensor:
        """Return the output of layer i's MLP."""
        return apply_mlp(layer, x)


def forward_layer(
    p: StackPass, i: int, layer: LayerView, x: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute one layer of the hidden states `residual + x`.

    The sum is left to the next norm, which adds and normalises in one pass over memory.

    Args:
        p: the forward that the layer belongs to.
        i: number of the layer.
        layer: its view.
        x: (T, d) output of the previous MLP, or the embeddings.
        residual: (T, d) residual stream without x, None for the embeddings.

    Returns:
        The MLP's output and the residual stream without it, (T, d) each, or (Tq, d) in the last layer.
    """
    h, residual = p.norm(layer.attention_norm, x, residual)
    attended = p.attend(i, layer, *p.project(i, layer, h))
    out_rows = p.out_rows(i)
    if out_rows is not None:
        residual = residual[out_rows]
    h, residual = p.norm(layer.mlp_norm, p.linear(layer.o, attended.flatten(1)), residual)
    return p.mlp(i, layer, h), residual


def _check_frozen(layer: LayerView) -> None:
    """Raise where a parameter of q, k or v requires a gradient, which `lora_qkv_rope` does not compute."""
    for module in layer.qkv:
        if not is_frozen([module]):
            raise BackendError(
                f"{layer.name_of(module)} requires a gradient, which the fused projection does not compute; freeze the "
                "base model with requires_grad_(False)"
            )
