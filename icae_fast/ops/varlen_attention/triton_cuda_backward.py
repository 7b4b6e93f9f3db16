"""The gradient of `varlen_attention` in Triton: dq by blocks of queries, then dk and dv by blocks of keys.

There are no atomic additions: a block of keys reads the queries of all heads that share its key head, so results do not
depend on the order of blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from icae_fast.ops._layout import unit_stride
from icae_fast.ops._lengths import on_host
from icae_fast.ops._triton import kernel, target
from icae_fast.ops.varlen_attention import tilings
from icae_fast.ops.varlen_attention.triton_cuda import binding, check, query_block
from icae_fast.ops.varlen_attention.triton_cuda_tiles import (
    LOG2E,
    entry,
    heads_tile,
    key_range,
    store_heads,
    tile,
    visible,
)
from icae_fast.ops.varlen_attention.work_list import key_work, query_work


@triton.jit
def _add_dq(
    dq, q, dout, logs, delta, k, v, k_t, v_t, positions, k_len, begin, end, scale, window,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the part of keys begin to end; `logs` is the log-sum-exp in powers of 2."""
    for start in range(begin, end, BLOCK_N):
        keys = tile(k, start, k_len, k_t, HEAD_DIM, BLOCK_N, D, MASKED)
        scores = tl.dot(q, keys.T, input_precision="ieee")
        weights = tl.exp2(scores * scale - logs[:, None])
        if MASKED:
            columns = start + tl.arange(0, BLOCK_N)
            weights = tl.where(visible(positions[:, None], columns[None, :], window), weights, 0.0)
        values = tile(v, start, k_len, v_t, HEAD_DIM, BLOCK_N, D, MASKED)
        grads = weights * (tl.dot(dout, values.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(grads.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@kernel(tilings.dq, key=("HEAD_DIM", "BLOCK_M", "PACK"))
@triton.jit
def _dq(
    dout, dlse, q, k, v, out, lse, dq, delta, work, used, heads, group, tokens, scale, window,
    dout_t, dout_h, q_t, q_h, k_t, k_h, v_t, v_h,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dq, and delta = sum(dout * out) - dlse of each query and head."""
    blocks = heads // PACK
    head = tl.program_id(0) % blocks * PACK
    first, q_begin, q_len, k_begin, k_len, _ = entry(work, used, tl.program_id(0) // blocks)
    queries = (first + tl.arange(0, BLOCK_M)) // PACK
    members = (first + tl.arange(0, BLOCK_M)) % PACK
    low = first // PACK
    high = tl.minimum(first + BLOCK_M, q_len * PACK) - 1
    shift = k_len - q_len
    positions = queries + shift

    q += q_begin.to(tl.int64) * q_t + head * q_h
    dout += q_begin.to(tl.int64) * dout_t + head * dout_h
    k += k_begin.to(tl.int64) * k_t + head // group * k_h
    v += k_begin.to(tl.int64) * v_t + head // group * v_h
    packed = (q_begin.to(tl.int64) * heads + head) * HEAD_DIM
    rows = head.to(tl.int64) * tokens + q_begin + members.to(tl.int64) * tokens + queries

    grad = heads_tile(dout, low, queries, members, q_len, dout_t, dout_h, HEAD_DIM, D, True)
    result = heads_tile(out + packed, low, queries, members, q_len, heads * HEAD_DIM, HEAD_DIM, HEAD_DIM, D, True)
    own_delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    own_delta -= tl.load(dlse + rows, mask=queries < q_len, other=0.0)
    tl.store(delta + rows, own_delta, mask=queries < q_len)

    at = heads_tile(q, low, queries, members, q_len, q_t, q_h, HEAD_DIM, D, True)
    logs = tl.load(lse + rows, mask=queries < q_len, other=float("inf")) * LOG2E
    begin, full_begin, full_end, end = key_range(low + shift, high // PACK + shift, window, BLOCK_N)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    if window is not None:
        acc = _add_dq(
            acc, at, grad, logs, own_delta, k, v, k_t, v_t, positions, k_len, begin, full_begin, scale * LOG2E, window,
            HEAD_DIM, D, BLOCK_N, True,
        )  # fmt: skip
    acc = _add_dq(
        acc, at, grad, logs, own_delta, k, v, k_t, v_t, positions, k_len, full_begin, full_end, scale * LOG2E, window,
        HEAD_DIM, D, BLOCK_N, False,
    )  # fmt: skip
    acc = _add_dq(
        acc, at, grad, logs, own_delta, k, v, k_t, v_t, positions, k_len, full_end, end, scale * LOG2E, window,
        HEAD_DIM, D, BLOCK_N, True,
    )  # fmt: skip
    store_heads(
        dq + packed, acc * scale, low, queries, members, q_len, heads * HEAD_DIM, HEAD_DIM, HEAD_DIM, D
    )  # fmt: skip


@triton.jit
def _add_dk_dv(
    dk, dv, k, v, q, dout, lse, delta, q_t, q_h, dout_t, dout_h, tokens, keys, q_len, shift, begin, end, scale, window,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the part of queries begin to end, which count queries times heads."""
    for start in range(begin, end, BLOCK_M):
        queries = (start + tl.arange(0, BLOCK_M)) // GROUP
        members = (start + tl.arange(0, BLOCK_M)) % GROUP
        low = start // GROUP
        rows = members.to(tl.int64) * tokens + queries
        at = heads_tile(q, low, queries, members, q_len, q_t, q_h, HEAD_DIM, D, True)
        logs = tl.load(lse + rows, mask=queries < q_len, other=float("inf")) * LOG2E
        weights = tl.exp2(tl.dot(k, at.T, input_precision="ieee") * scale - logs[None, :])
        if MASKED:
            weights = tl.where(visible((queries + shift)[None, :], keys[:, None], window), weights, 0.0)
        grad = heads_tile(dout, low, queries, members, q_len, dout_t, dout_h, HEAD_DIM, D, True)
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
        own_delta = tl.load(delta + rows, mask=queries < q_len, other=0.0)
        grads = weights * (tl.dot(v, grad.T, input_precision="ieee") - own_delta[None, :])
        dk = tl.dot(grads.to(at.dtype), at, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _query_range(first, last, shift, q_len, window, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Return the queries times heads that see keys `first` to `last`: begin, unmasked begin and end, end."""
    begin = tl.maximum(first - shift, 0) * GROUP
    end = q_len * GROUP
    full_begin = begin + tl.cdiv(tl.maximum((last - shift) * GROUP - begin, 0), BLOCK) * BLOCK
    full_end = end
    if window is not None:
        end = tl.minimum(end, (last + window - shift) * GROUP)
        full_end = begin + tl.maximum(tl.minimum(first + window - shift, q_len) * GROUP - begin, 0) // BLOCK * BLOCK
        full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@kernel(tilings.dk_dv, key=("HEAD_DIM", "BLOCK_N", "GROUP"))
@triton.jit
def _dk_dv(
    dout, q, k, v, lse, delta, dk, dv, work, used, kv_heads, tokens, scale, window,
    dout_t, dout_h, q_t, q_h, k_t, k_h, v_t, v_h,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % kv_heads
    first, q_begin, q_len, k_begin, k_len, all_keys = entry(work, used, tl.program_id(0) // kv_heads)
    keys = first + tl.arange(0, BLOCK_N)
    shift = k_len - q_len
    q += q_begin.to(tl.int64) * q_t + head * GROUP * q_h
    dout += q_begin.to(tl.int64) * dout_t + head * GROUP * dout_h
    lse += head.to(tl.int64) * GROUP * tokens + q_begin
    delta += head.to(tl.int64) * GROUP * tokens + q_begin
    own_k = tile(k + k_begin.to(tl.int64) * k_t + head * k_h, first, k_len, k_t, HEAD_DIM, BLOCK_N, D, True)
    own_v = tile(v + k_begin.to(tl.int64) * v_t + head * v_h, first, k_len, v_t, HEAD_DIM, BLOCK_N, D, True)
    last = tl.minimum(first + BLOCK_N, k_len) - 1
    begin, full_begin, full_end, end = _query_range(first, last, shift, q_len, window, GROUP, BLOCK_M)
    dk_acc = tl.zeros([BLOCK_N, D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, D], tl.float32)
    dk_acc, dv_acc = _add_dk_dv(
        dk_acc, dv_acc, own_k, own_v, q, dout, lse, delta, q_t, q_h, dout_t, dout_h, tokens, keys, q_len, shift,
        begin, tl.minimum(full_begin, end), scale * LOG2E, window, HEAD_DIM, D, GROUP, BLOCK_M, True,
    )  # fmt: skip
    dk_acc, dv_acc = _add_dk_dv(
        dk_acc, dv_acc, own_k, own_v, q, dout, lse, delta, q_t, q_h, dout_t, dout_h, tokens, keys, q_len, shift,
        full_begin, full_end, scale * LOG2E, window, HEAD_DIM, D, GROUP, BLOCK_M, False,
    )  # fmt: skip
    if window is not None:
        dk_acc, dv_acc = _add_dk_dv(
            dk_acc, dv_acc, own_k, own_v, q, dout, lse, delta, q_t, q_h, dout_t, dout_h, tokens, keys, q_len, shift,
            full_end, end, scale * LOG2E, window, HEAD_DIM, D, GROUP, BLOCK_M, True,
        )  # fmt: skip

    # Keys past k_len were loaded as zeros, which get a softmax weight.
    counted = (keys < k_len)[:, None]
    at = (k_begin.to(tl.int64) * kv_heads + head) * HEAD_DIM
    stride = kv_heads * HEAD_DIM
    dk_acc = tl.where(counted, dk_acc * scale, 0.0)
    store_heads(dk + at, dk_acc, first, keys, tl.zeros_like(keys), all_keys, stride, 0, HEAD_DIM, D)
    dv_acc = tl.where(counted, dv_acc, 0.0)
    store_heads(dv + at, dv_acc, first, keys, tl.zeros_like(keys), all_keys, stride, 0, HEAD_DIM, D)


def varlen_attention_backward(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, scale, window
):
    """Compute `varlen_attention_backward` of `icae_fast.ops.varlen_attention.ref`."""
    check(q, k, v)
    scale = float(scale)
    dout, q, k, v = (unit_stride(t) for t in (dout, q, k, v))
    dlse, out, lse = (t.contiguous() for t in (dlse, out, lse))
    (tokens, heads, head_dim), group = q.shape, q.shape[1] // k.shape[1]
    block, pack = query_block(q, group, cu_seqlens_q)
    work = query_work(cu_seqlens_q, cu_seqlens_k, block, pack)
    dq, dk, dv = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if on_host(cu)[-1] == len(t) else t.new_zeros(t.shape)
        for t, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    )
    delta = torch.empty_like(lse)
    shared = {
        "dout": dout, "q": q, "k": k, "v": v, "lse": lse, "delta": delta, "used": seqused_k, "tokens": tokens,
        "scale": scale, "window": binding(window, cu_seqlens_k), "dout_t": dout.stride(0), "dout_h": dout.stride(1),
        "q_t": q.stride(0), "q_h": q.stride(1), "k_t": k.stride(0), "k_h": k.stride(1), "v_t": v.stride(0),
        "v_h": v.stride(1), "HEAD_DIM": head_dim, "D": tilings.padded(head_dim),
    }  # fmt: skip
    _dq(
        (work.shape[0] * (heads // pack),), dlse=dlse, out=out, dq=dq, work=work, heads=heads, group=group,
        PACK=pack, BLOCK_M=block, **shared,
    )  # fmt: skip
    key_block = tilings.key_block(target(k.device), head_dim, k.dtype)
    work = key_work(cu_seqlens_q, cu_seqlens_k, key_block)
    _dk_dv(
        (work.shape[0] * k.shape[1],), dk=dk, dv=dv, work=work, kv_heads=k.shape[1], GROUP=group, BLOCK_N=key_block,
        **shared,
    )  # fmt: skip
    return dq, dk, dv
