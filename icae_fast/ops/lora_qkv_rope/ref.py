"""Plain-torch reference of `lora_qkv_rope` and its gradient, the definition that every kernel is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icae_fast.ops._dropout import dropout_scale
from icae_fast.ops._precision import compute_dtype

QUERY, VALUE = 0, 1  # projection of a dropout mask


def _rotate(y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head: y (T, H, D), cos and sin (T, D/2)."""
    y1, y2 = y.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(y.dtype), sin[:, None].to(y.dtype)
    return torch.cat((y1 * cos - y2 * sin, y2 * cos + y1 * sin), dim=-1)


def _rms_norm(y: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rms_norm_backward(grad: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    inv = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    grad = grad * weight
    return inv * grad - y * inv.pow(3) * (grad * y).mean(-1, keepdim=True)


class _Parts:
    """Operands in the compute dtype, split by q, k and v."""

    bq: torch.Tensor | None
    bk: torch.Tensor | None
    bv: torch.Tensor | None
    norms: tuple[torch.Tensor | None, ...]

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_a: torch.Tensor | None,
        lora_b: torch.Tensor | None, qk_norm: torch.Tensor | None, q_rows: torch.Tensor | None,
        seed: torch.Tensor | None, num_q_heads: int, num_kv_heads: int, p: float, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.nq = num_q_heads * weight.shape[0] // (num_q_heads + 2 * num_kv_heads)
        self.nk = (weight.shape[0] - self.nq) // 2
        sizes = (self.nq, self.nk, self.nk)
        self.x = x.to(dtype)
        self.xq = self.x if q_rows is None else self.x[q_rows]
        self.wq, self.wk, self.wv = weight.to(dtype).split(sizes)
        self.bq, self.bk, self.bv = (None,) * 3 if bias is None else bias.to(dtype).split(sizes)
        self.norms = (None, None) if qk_norm is None else qk_norm.to(dtype).unbind()
        self.lora = lora_a is not None
        if lora_a is not None and lora_b is not None:
            self.aq, self.av = lora_a.to(dtype).chunk(2)
            self.lbq, self.lbv = lora_b.to(dtype).split((self.nq, self.nk))
            mask_q = dropout_scale(seed, QUERY, x.shape, p, dtype, x.device, rows=q_rows)
            mask_v = dropout_scale(seed, VALUE, x.shape, p, dtype, x.device)
            self.mask_q, self.mask_v = mask_q, mask_v
            self.xq_dropped = self.xq if mask_q is None else self.xq * mask_q
            self.xv_dropped = self.x if mask_v is None else self.x * mask_v

    def q(self, scale: float) -> torch.Tensor:
        y = F.linear(self.xq, self.wq, self.bq)
        return y + scale * F.linear(F.linear(self.xq_dropped, self.aq), self.lbq) if self.lora else y

    def k(self) -> torch.Tensor:
        return F.linear(self.x, self.wk, self.bk)

    def v(self, scale: float) -> torch.Tensor:
        y = F.linear(self.x, self.wv, self.bv)
        return y + scale * F.linear(F.linear(self.xv_dropped, self.av), self.lbv) if self.lora else y


def lora_qkv_rope(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, qk_norm: torch.Tensor | None,
    q_rows: torch.Tensor | None, dropout_seed: torch.Tensor | None, num_q_heads: int, num_kv_heads: int,
    lora_scale: float, norm_eps: float, dropout_p: float, *, upcast: bool = True,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Compute `lora_qkv_rope`; `icae_fast.ops.lora_qkv_rope` documents the formula and the shapes."""
    dtype = compute_dtype(x, upcast)
    p = _Parts(x, weight, bias, lora_a, lora_b, qk_norm, q_rows, dropout_seed, num_q_heads, num_kv_heads, dropout_p, dtype)  # noqa: E501  # fmt: skip
    head_dim = p.nq // num_q_heads
    heads = [y.unflatten(-1, (-1, head_dim)) for y in (p.q(lora_scale), p.k(), p.v(lora_scale))]
    tables = [(cos, sin) if q_rows is None else (cos[q_rows], sin[q_rows]), (cos, sin)]
    for i, norm in enumerate(p.norms):
        if norm is not None:
            heads[i] = _rms_norm(heads[i], norm, norm_eps)
        heads[i] = _rotate(heads[i], *tables[i])
    return tuple(y.to(x.dtype, copy=True, memory_format=torch.contiguous_format) for y in heads)


def lora_qkv_rope_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None, lora_a: torch.Tensor | None, lora_b: torch.Tensor | None, cos: torch.Tensor,
    sin: torch.Tensor, qk_norm: torch.Tensor | None, q_rows: torch.Tensor | None, dropout_seed: torch.Tensor | None,
    num_q_heads: int, num_kv_heads: int, lora_scale: float, norm_eps: float, dropout_p: float, *, upcast: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x, lora_a and lora_b; the base weights are frozen."""
    dtype = compute_dtype(x, upcast)
    p = _Parts(x, weight, bias, lora_a, lora_b, qk_norm, q_rows, dropout_seed, num_q_heads, num_kv_heads, dropout_p, dtype)  # noqa: E501  # fmt: skip
    tables = [(cos, sin) if q_rows is None else (cos[q_rows], sin[q_rows]), (cos, sin)]
    grads = [dq.to(dtype), dk.to(dtype)]
    for i, norm in enumerate(p.norms):
        grads[i] = _rotate(grads[i], tables[i][0], -tables[i][1])
        if norm is not None:  # the values before the norm are not saved; recomputing them costs one GEMM
            before = (p.q(lora_scale), p.k())[i].view_as(grads[i])
            grads[i] = _rms_norm_backward(grads[i], before, norm, norm_eps)
    gq, gk, gv = (g.flatten(1) for g in (*grads, dv.to(dtype)))
    dx = gk @ p.wk + gv @ p.wv
    dxq = gq @ p.wq
    da, db = x.new_empty(0), x.new_empty(0)
    if lora_a is not None and lora_b is not None:
        gaq, gav = lora_scale * (gq @ p.lbq), lora_scale * (gv @ p.lbv)
        da = torch.cat((gaq.T @ p.xq_dropped, gav.T @ p.xv_dropped)).to(lora_a.dtype)
        db = torch.cat((gq.T @ F.linear(p.xq_dropped, p.aq), gv.T @ F.linear(p.xv_dropped, p.av)))
        db = (lora_scale * db).to(lora_b.dtype)
        dxq = dxq + (gaq @ p.aq if p.mask_q is None else gaq @ p.aq * p.mask_q)
        dx = dx + (gav @ p.av if p.mask_v is None else gav @ p.av * p.mask_v)
    dx = dx + dxq if q_rows is None else dx.index_add(0, q_rows, dxq)
    return dx.to(x.dtype), da, db
