"""`decode_step` on CUDA: ten launches a layer, products by cuBLAS, and no host synchronisation.

Kernels read everything that changes from step to step (tokens, angles, tail lengths) from device memory, so a CUDA
graph of one step replays for the following steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from icae_fast.ops._layout import power_of_2
from icae_fast.ops._triton import kernel
from icae_fast.ops.decode_step.arguments import StepArguments
from icae_fast.ops.decode_step.ref import MATRICES
from icae_fast.ops.rms_norm import triton_cuda as norms_on_cuda
from icae_fast.ops.shared_prefix_attention.triton_cuda import Rows
from icae_fast.ops.swiglu.triton_cuda import activation


@kernel(lambda arch, arguments: [triton.Config({}, num_warps=1, num_stages=1)])
@triton.jit
def _split_heads(
    qkv, qk_norm, cos, sin, q, keys, values, tail_starts, tail_lengths, eps, key_stride, key_head_stride, value_stride,
    value_head_stride, HQ: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm and RoPE of one head of one row; stores queries in q, keys and values at the end of the row's tail."""
    row, head = tl.program_id(0), tl.program_id(1)
    place = (tl.load(tail_starts + row) + tl.load(tail_lengths + row) - 1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    at = qkv + (row.to(tl.int64) * (HQ + 2 * HKV) + head) * (2 * HALF) + columns
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if head >= HQ + HKV:
        to = values + place * value_stride + (head - HQ - HKV) * value_head_stride + columns
        tl.store(to, first.to(values.dtype.element_ty), mask=inside)
        tl.store(to + HALF, second.to(values.dtype.element_ty), mask=inside)
    else:
        if qk_norm is not None:
            inverse = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / (2 * HALF) + eps)
            weight = qk_norm + (head >= HQ).to(tl.int32) * (2 * HALF) + columns
            first *= inverse * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
            second *= inverse * tl.load(weight + HALF, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + row * HALF + columns, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + row * HALF + columns, mask=inside, other=0.0).to(tl.float32)
        left, right = (first * c - second * s).to(q.dtype.element_ty), (second * c + first * s).to(q.dtype.element_ty)
        if head < HQ:
            to = q + (row.to(tl.int64) * HQ + head) * (2 * HALF) + columns
            tl.store(to, left, mask=inside)
            tl.store(to + HALF, right, mask=inside)
        else:
            to = keys + place * key_stride + (head - HQ) * key_head_stride + columns
            tl.store(to, left, mask=inside)
            tl.store(to + HALF, right, mask=inside)


def _heads(
    qkv: torch.Tensor, qk_norm: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, rows: Rows, num_q_heads: int, eps: float,
) -> torch.Tensor:  # fmt: skip
    """Return queries (R, Hq, D), and write this step's keys and values to a layer's tails (N, Hkv, D)."""
    n, num_kv_heads, head_dim = qkv.shape[0], keys.shape[1], keys.shape[2]
    q = qkv.new_empty(n, num_q_heads, head_dim)
    _split_heads(
        (n, num_q_heads + 2 * num_kv_heads), qkv=qkv, qk_norm=qk_norm, cos=cos, sin=sin, q=q, keys=keys, values=values,
        tail_starts=rows.tail_starts, tail_lengths=rows.tail_lengths, eps=eps, key_stride=keys.stride(0),
        key_head_stride=keys.stride(1), value_stride=values.stride(0), value_head_stride=values.stride(1),
        HQ=num_q_heads, HKV=num_kv_heads, HALF=head_dim // 2, BLOCK=power_of_2(head_dim // 2),
    )  # fmt: skip
    return q


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of `residual + x` in the dtype of x, and that sum in fp32 (x itself without a residual)."""
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x, dtype=torch.float32)
    norms_on_cuda._forward(
        (x.shape[0],), x=x, residual=residual, weight=weight, y=y, total=total, d=x.shape[1], eps=eps,
        x_stride=x.stride(0), residual_stride=0 if residual is None else residual.stride(0),
    )  # fmt: skip
    return y, total


def _logits(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return `x head^T`, rounded to fp32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, head.t(), out_dtype=torch.float32)
    return F.linear(x.float(), head.float())


def decode_step(*arguments: Any, **named: Any) -> torch.Tensor:
    """Compute `icae_fast.ops.decode_step` of `StepArguments`."""
    a = StepArguments(*arguments, **named)
    n = a.tokens.shape[0]
    if not n:
        return a.embedding.new_empty((0, a.head.shape[0]), dtype=torch.float32)
    rows = Rows.of(
        range(n + 1), a.num_q_heads, a.tail_keys, a.tail_values, a.tail_starts, a.tail_lengths, a.prefix_keys,
        a.prefix_values, a.prefix_rows, any(a.windows),
    )  # fmt: skip
    cos, sin, eps = a.cos.contiguous(), a.sin.contiguous(), a.norm_eps
    x, residual = a.embedding.index_select(0, a.tokens), None
    for i, window in enumerate(a.windows):
        qkv, o, gate_up, down = ((a.matrices[j], a.biases[j]) for j in range(MATRICES * i, MATRICES * (i + 1)))
        x, residual = _norm(x, residual, a.norms[2 * i], eps)
        q = _heads(
            F.linear(x, *qkv), a.qk_norms[i], cos, sin, a.tail_keys[i], a.tail_values[i], rows, a.num_q_heads, eps
        )
        x = F.linear(rows.attend(q, a.scale, window, layer=i).flatten(1), *o)
        x, residual = _norm(x, residual, a.norms[2 * i + 1], eps)
        x = F.linear(activation(F.linear(x, *gate_up)), *down)
    return _logits(_norm(x, residual, a.norms[-1], eps)[0], a.head)
