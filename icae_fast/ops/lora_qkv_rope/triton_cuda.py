"""`lora_qkv_rope` in Triton: one grouped GEMM over packed QKV, with everything else in its epilogue.

The two elements that RoPE rotates together are neighbouring columns of a tile: column 2 p + h is row h D / 2 + i of
W's head, for the pair p = (head, i). Rows of W can be loaded in any order at no cost, and neighbouring columns of an
accumulator belong to the same thread on every architecture, so pairs are split without a shuffle. Heads of 80 or 96
need no padding, except under the norm, which needs whole heads in a tile.

Loads go through pointers (`cp.async`), not through TMA descriptors: queries may be gathered rows, x a view of any
alignment, and Triton's descriptors need an allocator set for the whole process.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from icae_fast.ops._layout import cdiv, power_of_2
from icae_fast.ops._triton import kernel
from icae_fast.ops.lora_qkv_rope.triton_cuda_common import Adapters, Operands, grouped, load, project, query_rows


def _configs(arch, arguments):
    d, rank, head = arguments["d"], arguments["rank"], 2 * arguments["SLOT"]
    whole = head if arguments["qk_norm"] is not None else 2

    def config(m, n, k, warps, stages):
        n = max(n, whole)
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PARTS": 2 if n >= 2 * whole else 1, "GROUP": 8}
        even = {"EVEN_K": d % k == 0 and rank % k == 0}
        return triton.Config(blocks | even, num_warps=warps, num_stages=stages)

    if arch == 0:
        return [config(32, 64, 64, 4, 1)]
    if arguments["x"].dtype == torch.float32:
        return [config(32, 64, 32, 4, 2)]
    if whole > 128:  # the norm needs a whole head of 256 in a tile
        return [config(64, whole, 32, 8, 4 if arch < 90 else 5), config(32, whole, 32, 4, 4)]
    if arch < 90:
        return [config(128, 128, 32, 8, 4), config(128, 128, 64, 8, 3), config(64, 64, 64, 4, 3)]
    middle = config(128, 128, 64, 8 if whole > 64 else 4, 4)  # a single part needs the registers of more threads
    return [config(128, 256, 64, 8, 3), middle, config(64, 128, 64, 4, 4)]


@triton.jit
def _add_product(acc, left, right, size, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + L R^T for pointers to rows of L (m, 1) and of R (1, n), each of `size` elements."""
    lanes = tl.arange(0, BLOCK_K)
    left += lanes[None, :]
    right += lanes[:, None]
    for start in range(0, size, BLOCK_K):
        rest = lanes < size - start
        a = load(left, None if EVEN_K else rest[None, :])
        b = load(right, None if EVEN_K else rest[:, None])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K
    return acc


@triton.jit
def _norm(first, second, weight, i, inside, eps, HALF: tl.constexpr, SLOT: tl.constexpr):
    """RMS norm of whole heads, `first` and `second` being their halves (m, heads * SLOT) and `i` columns of a half."""
    heads: tl.constexpr = first.shape[1] // SLOT
    squares = tl.where(inside[None, :], first * first + second * second, 0.0)
    mean = tl.sum(tl.reshape(squares, [first.shape[0], heads, SLOT]), axis=2) / (2 * HALF)
    inverse = tl.broadcast_to(tl.rsqrt(mean + eps)[:, :, None], [first.shape[0], heads, SLOT])
    inverse = tl.reshape(inverse, [first.shape[0], heads * SLOT])
    first *= inverse * load(weight + i, inside).to(tl.float32)[None, :]
    second *= inverse * load(weight + HALF + i, inside).to(tl.float32)[None, :]
    return first, second


@triton.jit
def _rotate(first, second, cos, sin, rows, i, mask, HALF: tl.constexpr):
    """Rotate pairs by RoPE where the mask is true."""
    at = rows[:, None] * HALF + i[None, :]
    c = tl.load(cos + at, mask=mask, other=1.0)
    s = tl.load(sin + at, mask=mask, other=0.0)
    return first * c - second * s, second * c + first * s


@triton.jit
def _store_halves(out, first, second, at, mask, HALF: tl.constexpr):
    tl.store(out + at, first.to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + HALF, second.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _epilogue(
    acc, part, numbers, rows, count, kind, heads, above, bias, cos, sin, qk_norm, eps, q, k, v,
    HALF: tl.constexpr, SLOT: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Epilogue of column block `part` of q, k or v: bias, head norm, RoPE, store."""
    pairs: tl.constexpr = acc.shape[1] // 2
    first, second = tl.split(tl.reshape(acc, [acc.shape[0], pairs, 2]))
    pair = part * pairs + tl.arange(0, pairs)
    head, i = pair // SLOT, pair % SLOT
    inside = (head < heads) & (i < HALF)
    mask = (numbers < count)[:, None] & inside[None, :]
    if bias is not None:
        at = bias + (above + head) * (2 * HALF) + i
        first += load(at, inside).to(tl.float32)[None, :]
        second += load(at + HALF, inside).to(tl.float32)[None, :]
    if EPILOGUE:
        if qk_norm is not None and kind < 2:
            first, second = _norm(first, second, qk_norm + kind * (2 * HALF), i, inside, eps, HALF, SLOT)
        turned = mask & (i < tl.where(kind < 2, HALF, 0))[None, :]
        first, second = _rotate(first, second, cos, sin, rows, i, turned, HALF)
    at = (numbers[:, None].to(tl.int64) * heads + head[None, :]) * (2 * HALF) + i[None, :]
    if kind == 0:
        _store_halves(q, first, second, at, mask, HALF)
    elif kind == 1:
        _store_halves(k, first, second, at, mask, HALF)
    else:
        _store_halves(v, first, second, at, mask, HALF)


@kernel(_configs, key=("d", "rank", "size_class", "SLOT", "EPILOGUE"))
@triton.jit
def _forward(
    x, weight, bias, xa, lora_b, cos, sin, qk_norm, q_rows, q, k, v,
    n_queries, n_rows, d, rank, q_heads, kv_heads, kinds, scale, eps, x_stride, w_stride, xa_stride, xa_v, b_stride,
    size_class, HALF: tl.constexpr, SLOT: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    pairs: tl.constexpr = BLOCK_N // 2
    q_columns, kv_columns = tl.cdiv(q_heads * SLOT, pairs), tl.cdiv(kv_heads * SLOT, pairs)
    tile = tl.program_id(0)
    if q_rows is None:
        tile_m, column = grouped(tile, tl.cdiv(n_rows, BLOCK_M), q_columns + (kinds - 1) * kv_columns, GROUP)
    else:
        q_tiles = tl.cdiv(n_queries, BLOCK_M) * q_columns
        if tile < q_tiles:
            tile_m, column = grouped(tile, tl.cdiv(n_queries, BLOCK_M), q_columns, GROUP)
        else:
            tile_m, column = grouped(tile - q_tiles, tl.cdiv(n_rows, BLOCK_M), (kinds - 1) * kv_columns, GROUP)
            column += q_columns
    # kind 0 is q, 1 is k, 2 is v; `above` counts the heads of the preceding kinds.
    kind = tl.where(column < q_columns, 0, tl.where(column < q_columns + kv_columns, 1, 2))
    heads = tl.where(kind == 0, q_heads, kv_heads)
    above = tl.where(kind == 0, 0, q_heads + (kind - 1) * kv_heads)
    column -= tl.where(kind == 0, 0, q_columns + (kind - 1) * kv_columns)
    count = tl.where(kind == 0, n_queries, n_rows)
    numbers = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    clamped = tl.minimum(numbers, count - 1)
    rows = query_rows(clamped, q_rows, n_queries, kind == 0)

    pair = column * pairs + tl.arange(0, BLOCK_N) // 2
    in_head = tl.minimum(pair % SLOT, HALF - 1) + (tl.arange(0, BLOCK_N) % 2) * HALF
    place = tl.minimum(pair // SLOT, heads - 1) * (2 * HALF) + in_head
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if xa is not None:
        left = xa + tl.where(kind == 2, xa_v, 0).to(tl.int64) + clamped[:, None].to(tl.int64) * xa_stride
        b_row = place + tl.where(kind == 2, q_heads * (2 * HALF), 0)
        right = lora_b + b_row[None, :].to(tl.int64) * b_stride
        acc = _add_product(acc, left, right, tl.where(kind == 1, 0, rank), BLOCK_K, EVEN_K, PRECISION) * scale
    w_row = above * (2 * HALF) + place
    left = x + rows[:, None] * x_stride
    right = weight + w_row[None, :].to(tl.int64) * w_stride
    acc = _add_product(acc, left, right, d, BLOCK_K, EVEN_K, PRECISION)
    # A wide tile runs its epilogue in parts: all its RoPE tables at once do not fit beside the accumulator.
    if PARTS == 1:
        _epilogue(
            acc, column, numbers, rows, count, kind, heads, above, bias, cos, sin, qk_norm, eps, q, k, v,
            HALF, SLOT, EPILOGUE,
        )  # fmt: skip
    else:
        halves = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, pairs]), [0, 2, 1]))
        for part in tl.static_range(2):
            _epilogue(
                halves[part], 2 * column + part, numbers, rows, count, kind, heads, above, bias, cos, sin, qk_norm,
                eps, q, k, v, HALF, SLOT, EPILOGUE,
            )  # fmt: skip


def run(
    o: Operands, xa: Adapters | None, *, finished: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return q, k and v, or with `finished=False` q and k before norm and RoPE, and None.

    Args:
        o: the operands.
        xa: result of `project`, None without LoRA.
        finished: apply norm and RoPE, and compute v.
    """
    half = o.head_dim // 2
    q = o.x.new_empty(o.n_queries, o.q_heads, o.head_dim)
    k = o.x.new_empty(o.n_rows, o.kv_heads, o.head_dim)
    v = torch.empty_like(k) if finished else None
    norm = o.qk_norm if finished else None
    slot, kinds = half if norm is None else power_of_2(half), 3 if finished else 2

    def grid(a):
        q_columns, kv_columns = (cdiv(h * slot, a["BLOCK_N"] // 2) for h in (o.q_heads, o.kv_heads))
        q_tiles, tiles = (cdiv(n, a["BLOCK_M"]) for n in (o.n_queries, o.n_rows))
        return (q_tiles * q_columns + tiles * (kinds - 1) * kv_columns,)

    _forward(
        grid, x=o.x, weight=o.weight, bias=o.bias, xa=xa and xa.buffer, lora_b=o.lora_b, cos=o.cos, sin=o.sin,
        qk_norm=norm, q_rows=o.q_rows, q=q, k=k, v=k if v is None else v, n_queries=o.n_queries, n_rows=o.n_rows,
        d=o.d, rank=o.rank, q_heads=o.q_heads, kv_heads=o.kv_heads, kinds=kinds, scale=o.scale, eps=o.eps,
        x_stride=o.x.stride(0), w_stride=o.weight.stride(0), xa_stride=xa.stride if xa else 0,
        xa_v=xa.v_offset if xa else 0, b_stride=0 if o.lora_b is None else o.lora_b.stride(0), size_class=o.size_class,
        HALF=half, SLOT=slot, EPILOGUE=finished, PRECISION=o.precision,
    )  # fmt: skip
    return q, k, v


def lora_qkv_rope(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute `icae_fast.ops.lora_qkv_rope`."""
    o = Operands(*arguments)
    return run(o, project(o))
