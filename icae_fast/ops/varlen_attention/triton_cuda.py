"""`varlen_attention` in Triton: a block holds its queries with an online softmax, and reads the keys once.

If rows have few queries, a block takes those of all heads that share a key head. This fills its tiles, and keys are
read once for the group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from icae_fast.errors import BackendError
from icae_fast.ops._declare import GPU_DTYPES
from icae_fast.ops._layout import power_of_2, unit_stride
from icae_fast.ops._lengths import known
from icae_fast.ops._triton import kernel, target
from icae_fast.ops.varlen_attention import tilings
from icae_fast.ops.varlen_attention.triton_cuda_tiles import (
    LN2,
    LOG2E,
    LOWEST,
    entry,
    heads_tile,
    key_range,
    store_heads,
    tile,
    visible,
)
from icae_fast.ops.varlen_attention.work_list import query_work

_PACKED_QUERIES = 32  # rows with at most this many queries are packed by heads
_LARGEST_HEAD = 256


@triton.jit
def _attend(
    acc, top, total, q, k, v, k_t, v_t, positions, k_len, begin, end, scale, window,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Process keys begin to end; `top` is the running maximum of scores (base 2), `total` the sum of weights."""
    for start in range(begin, end, BLOCK_N):
        scores = tl.dot(q, tile(k, start, k_len, k_t, HEAD_DIM, BLOCK_N, D, MASKED).T, input_precision="ieee")
        if MASKED:
            keys = start + tl.arange(0, BLOCK_N)
            mask = visible(positions[:, None], keys[None, :], window)
            scores = tl.where(mask, scores * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - new_top[:, None])
        fade = tl.exp2(top - new_top)
        top = new_top
        total = total * fade + tl.sum(weights, 1)
        values = tile(v, start, k_len, v_t, HEAD_DIM, BLOCK_N, D, MASKED)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return acc, top, total


@kernel(tilings.forward, key=("HEAD_DIM", "BLOCK_M", "PACK"))
@triton.jit
def _forward(
    q, k, v, out, lse, work, used, heads, group, tokens, scale, window, q_t, q_h, k_t, k_h, v_t, v_h,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    k += k_begin.to(tl.int64) * k_t + head // group * k_h
    v += k_begin.to(tl.int64) * v_t + head // group * v_h
    at = heads_tile(q, low, queries, members, q_len, q_t, q_h, HEAD_DIM, D, True)
    begin, full_begin, full_end, end = key_range(low + shift, high // PACK + shift, window, BLOCK_N)
    scale *= LOG2E
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if window is not None:
        acc, top, total = _attend(
            acc, top, total, at, k, v, k_t, v_t, positions, k_len, begin, full_begin, scale, window,
            HEAD_DIM, D, BLOCK_N, True,
        )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, at, k, v, k_t, v_t, positions, k_len, full_begin, full_end, scale, window,
        HEAD_DIM, D, BLOCK_N, False,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, at, k, v, k_t, v_t, positions, k_len, full_end, end, scale, window,
        HEAD_DIM, D, BLOCK_N, True,
    )  # fmt: skip

    # A query without keys results in 0 and -inf; one whose scores are all -inf in NaN, as in a plain softmax.
    total = tl.where((positions >= 0) & (queries < q_len), total, 1.0)
    result = acc / total[:, None]
    logs = tl.where(positions >= 0, top * LN2 + tl.log2(total) * LN2, float("-inf"))
    out += (q_begin.to(tl.int64) * heads + head) * HEAD_DIM
    store_heads(out, result, low, queries, members, q_len, heads * HEAD_DIM, HEAD_DIM, HEAD_DIM, D)
    lse += head.to(tl.int64) * tokens + q_begin
    tl.store(lse + members.to(tl.int64) * tokens + queries, logs, mask=queries < q_len)


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, scale, window):
    """Compute `icae_fast.ops.varlen_attention`."""
    check(q, k, v)
    q, k, v = (unit_stride(t) for t in (q, k, v))
    if scale < 0:  # the online softmax takes the maximum of products before scaling
        q, scale = -q, -scale
    (tokens, heads, head_dim), group = q.shape, q.shape[1] // k.shape[1]
    block, pack = query_block(q, group, cu_seqlens_q)
    work = query_work(cu_seqlens_q, cu_seqlens_k, block, pack)
    whole = known(cu_seqlens_q).values[-1] == tokens
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if whole else q.new_zeros(q.shape)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    if not whole:
        lse.fill_(float("-inf"))
    _forward(
        (work.shape[0] * (heads // pack),), q=q, k=k, v=v, out=out, lse=lse, work=work, used=seqused_k,
        heads=heads, group=group, tokens=tokens, scale=float(scale), window=binding(window, cu_seqlens_k),
        q_t=q.stride(0), q_h=q.stride(1), k_t=k.stride(0), k_h=k.stride(1), v_t=v.stride(0), v_h=v.stride(1),
        HEAD_DIM=head_dim, D=tilings.padded(head_dim), PACK=pack, BLOCK_M=block,
    )  # fmt: skip
    return out, lse


def query_block(q, group, cu_seqlens_q):
    """Return the number of queries times heads in a block, and the number of heads packed in it."""
    longest = known(cu_seqlens_q).longest
    pack = group if longest <= _PACKED_QUERIES else 1
    largest = tilings.largest_query_block(target(q.device), q.shape[2], q.dtype)
    return max(16, min(largest, power_of_2(max(longest, 1) * pack))), pack


def binding(window, cu_seqlens_k):
    """Return the window, None if no row is long enough for it to hide a key."""
    return window if 0 < window < known(cu_seqlens_k).longest else None


def check(q, k, v):
    """Raise if the kernels do not support the inputs.

    Raises:
        BackendError: unsupported or differing dtypes, head sizes or shapes.
    """
    if q.dtype not in GPU_DTYPES or not q.dtype == k.dtype == v.dtype:
        raise BackendError(
            f"varlen_attention: q is {q.dtype}, k {k.dtype} and v {v.dtype}; the Triton kernels take float32, float16 "
            "or bfloat16, the same for all"
        )
    if not 1 <= q.shape[2] <= _LARGEST_HEAD or not q.shape[2:] == k.shape[2:] == v.shape[2:]:
        raise BackendError(
            f"varlen_attention: heads of {q.shape[2]}, {k.shape[2]} and {v.shape[2]}; the Triton kernels take "
            f"1 to {_LARGEST_HEAD}, the same for all"
        )
    if q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2]:
        raise BackendError(f"varlen_attention: q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
