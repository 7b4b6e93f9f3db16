"""The gradient of `lora_qkv_rope`, in up to five Triton launches and plain products by cuBLAS.

1. Recompute `x A^T` for B's gradient; with a q/k norm also q and k before it, by the forward's kernel.
2. `_undo`: in one read of dq and dk, compute G (the gradients before norm and RoPE), and s G B for A's and x's
   gradients. LoRAFusion (arXiv 2510.00206) found this cut best, with B's product while G is in registers.
3. `_input_gradient`: G W and (s G B) A, the latter under the dropout masks, in one accumulation.
4. A's gradient (s G B)^T x: cuBLAS, or with dropout `_a_gradient`, which computes the masks inline.
5. B's gradient s G^T (x A^T): cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from icae_fast.ops._layout import cdiv, power_of_2
from icae_fast.ops._triton import kernel
from icae_fast.ops.lora_qkv_rope.triton_cuda import run
from icae_fast.ops.lora_qkv_rope.triton_cuda_common import Adapters, Operands, grouped, load, project, query_rows
from icae_fast.ops.lora_qkv_rope.triton_cuda_dropout import kept, row_keys


def _undo_configs(arch, arguments):
    half = max(16, power_of_2(arguments["HALF"]))
    ranks = max(16, power_of_2(arguments["rank"]))

    def config(m, most, warps, stages):
        return triton.Config({"BLOCK_M": m, "BLOCK_R": min(ranks, most), "BLOCK_HALF": half}, warps, stages)

    if arch == 0:
        return [config(32, 64, 4, 1)]
    if arguments["dq"].dtype == torch.float32:
        return [config(16, 32, 4, 1)]
    if half > 64:
        small = config(16, 128 * 128 // half, 4, 2)
        return [small] if arch == 89 else [config(32, 128 * 128 // half, 8, 2), small]  # 99 KB of shared memory
    # A tile recomputes its part of G for each block of ranks.
    return [config(32, 256, 4, 2) if ranks > 128 else config(32, 128, 8, 2), config(64, 128, 8, 2)]


@triton.jit
def _norm_backward(first, second, before, at, mask, weight, i, inside, eps, HALF: tl.constexpr):
    y1, y2 = load(before + at, mask).to(tl.float32), load(before + at + HALF, mask).to(tl.float32)
    first *= load(weight + i, inside).to(tl.float32)[None, :]
    second *= load(weight + HALF + i, inside).to(tl.float32)[None, :]
    inverse = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, axis=1) / (2 * HALF) + eps)
    along = inverse * inverse * inverse * (tl.sum(first * y1 + second * y2, axis=1) / (2 * HALF))
    first = inverse[:, None] * first - along[:, None] * y1
    second = inverse[:, None] * second - along[:, None] * y2
    return first, second


@triton.jit
def _undo_heads(
    grad, before, out, norm, b, b_stride, gb, gb_stride, numbers, rows, count, heads, rank, cos, sin, scale, eps,
    ROTATED: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """All heads of q, k or v for the rows of a tile; stores G in `out` and G times `b` in `gb`."""
    i = tl.arange(0, BLOCK_HALF)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, valid = i < HALF, ranks < rank
    mask = (numbers < count)[:, None] & inside[None, :]
    numbers = numbers[:, None].to(tl.int64)
    if ROTATED:
        c = load(cos + rows[:, None] * HALF + i[None, :], mask)
        s = load(sin + rows[:, None] * HALF + i[None, :], mask)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for head in range(heads):
        at = (numbers * heads + head) * (2 * HALF) + i[None, :]
        first, second = load(grad + at, mask), load(grad + at + HALF, mask)
        if ROTATED:
            f, g = first.to(tl.float32), second.to(tl.float32)
            f, g = f * c + g * s, g * c - f * s
            if norm is not None:
                f, g = _norm_backward(f, g, before, at, mask, norm, i, inside, eps, HALF)
            first, second = f.to(first.dtype), g.to(first.dtype)
            once = mask & (i < tl.where(tl.program_id(2) == 0, HALF, 0))[None, :]
            tl.store(out + at, first, mask=once)
            tl.store(out + at + HALF, second, mask=once)
        if b is not None:
            right = b + (head * (2 * HALF) + i)[:, None].to(tl.int64) * b_stride + ranks[None, :]
            right_mask = inside[:, None] & valid[None, :]
            acc = tl.dot(first, load(right, right_mask), acc, input_precision=PRECISION)
            acc = tl.dot(second, load(right + HALF * b_stride, right_mask), acc, input_precision=PRECISION)
    if b is not None:
        to = gb + numbers * gb_stride + ranks[None, :]
        tl.store(to, (acc * scale).to(gb.dtype.element_ty), mask=(numbers < count) & valid[None, :])


@kernel(_undo_configs, key=("rank", "size_class", "HALF"))
@triton.jit
def _undo(
    dq, dk, dv, q_before, k_before, gq, gk, cos, sin, q_norm, k_norm, b_q, b_v, gb_q, gb_v, q_rows,
    n_queries, n_rows, q_heads, kv_heads, rank, b_stride, gb_stride, scale, eps, size_class,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    kind = tl.program_id(1)
    numbers = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if (kind == 0) & (tl.program_id(0) * BLOCK_M < n_queries):
        rows = query_rows(tl.minimum(numbers, n_queries - 1), q_rows, n_queries, kind == 0)
        _undo_heads(
            dq, q_before, gq, q_norm, b_q, b_stride, gb_q, gb_stride, numbers, rows, n_queries, q_heads, rank,
            cos, sin, scale, eps, True, HALF, PRECISION, BLOCK_M, BLOCK_R, BLOCK_HALF,
        )  # fmt: skip
    if (kind == 1) & (tl.program_id(2) == 0):
        _undo_heads(
            dk, k_before, gk, k_norm, None, 0, None, 0, numbers, numbers.to(tl.int64), n_rows, kv_heads, rank,
            cos, sin, scale, eps, True, HALF, PRECISION, BLOCK_M, BLOCK_R, BLOCK_HALF,
        )  # fmt: skip
    if b_v is not None and kind == 2:
        _undo_heads(
            dv, None, None, None, b_v, b_stride, gb_v, gb_stride, numbers, None, n_rows, kv_heads, rank,
            None, None, scale, eps, False, HALF, PRECISION, BLOCK_M, BLOCK_R, BLOCK_HALF,
        )  # fmt: skip


def _input_configs(arch, arguments):
    d, inner = arguments["d"], (arguments["q_width"], arguments["kv_width"], arguments["rank"])
    dropout = arguments["seed"] is not None

    def config(m, n, k, warps, stages):
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
        even = {"EVEN_K": all(size % k == 0 for size in inner), "EVEN_N": d % n == 0}
        return triton.Config(blocks | even, num_warps=warps, num_stages=stages)

    if arch == 0:
        return [config(32, 64, 64, 4, 1)]
    if arguments["dx"].dtype == torch.float32:
        return [config(32, 64, 32, 4, 2)]
    # With dropout q's part is masked before v's is added: two accumulators at a time.
    if arch < 90:
        middle = config(128, 64, 64, 8, 3) if dropout else config(128, 128, 64, 8, 3)
        return [config(128, 128, 32, 8, 4), middle, config(64, 64, 64, 4, 3)]
    if dropout:
        middle = config(128, 64 if arguments["inverse"] is not None else 128, 64, 8, 4)
        return [config(128, 128, 32, 8, 4), middle, config(64, 128, 64, 8, 4)]
    return [config(128, 256, 64, 8, 3), config(128, 128, 64, 8, 3), config(64, 128, 64, 4, 4)]


@triton.jit
def _add_product(
    acc, left, left_mask, right, right_stride, right_mask, size,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + L R for pointers to rows of L (m, 1) of `size` elements and to the first row of R (1, n)."""
    lanes = tl.arange(0, BLOCK_K)
    left += lanes[None, :]
    right += lanes[:, None].to(tl.int64) * right_stride
    for start in range(0, size, BLOCK_K):
        left_ok, right_ok = left_mask, right_mask
        if not EVEN_K:
            rest = lanes < size - start
            left_ok = rest[None, :] if left_mask is None else left_mask & rest[None, :]
            right_ok = rest[:, None] if right_mask is None else right_mask & rest[:, None]
        acc = tl.dot(load(left, left_ok), load(right, right_ok), acc, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K * right_stride
    return acc


@kernel(_input_configs, key=("d", "rank", "q_width", "kv_width", "size_class"))
@triton.jit
def _input_gradient(
    gq, gk, gv, w_q, w_k, w_v, gb_q, gb_v, a_q, a_v, inverse, seed, dx,
    n_rows, d, q_width, kv_width, rank, w_stride, gb_stride, a_stride, threshold, keep_scale, size_class,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(d, BLOCK_N), GROUP)
    numbers = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    rows = tl.minimum(numbers, n_rows - 1).to(tl.int64)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = None if EVEN_N else columns < d
    queries, asked, q_size, q_rank = rows, None, q_width, rank
    if inverse is not None:
        queries = tl.load(inverse + rows).to(tl.int64)
        asked = queries >= 0
        some = tl.max(tl.max(asked.to(tl.int32), axis=1), axis=0)  # few tiles have a query; the others skip it
        q_size, q_rank = some * q_width, some * rank
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if gb_q is not None:
        acc = _add_product(
            acc, gb_v + rows * gb_stride, None, a_v + columns, a_stride, valid, rank, BLOCK_K, EVEN_K, PRECISION
        )
        acc_q = acc
        if seed is not None:
            acc = tl.where(kept(row_keys(seed, 1, rows), columns, threshold), acc * keep_scale, 0.0)
            acc_q = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc_q = _add_product(
            acc_q, gb_q + queries * gb_stride, asked, a_q + columns, a_stride, valid, q_rank, BLOCK_K, EVEN_K, PRECISION
        )
        if seed is not None:
            acc += tl.where(kept(row_keys(seed, 0, rows), columns, threshold), acc_q * keep_scale, 0.0)
        else:
            acc = acc_q
    acc = _add_product(
        acc, gq + queries * q_width, asked, w_q + columns, w_stride, valid, q_size, BLOCK_K, EVEN_K, PRECISION
    )
    acc = _add_product(
        acc, gk + rows * kv_width, None, w_k + columns, w_stride, valid, kv_width, BLOCK_K, EVEN_K, PRECISION
    )
    acc = _add_product(
        acc, gv + rows * kv_width, None, w_v + columns, w_stride, valid, kv_width, BLOCK_K, EVEN_K, PRECISION
    )
    to = dx + numbers.to(tl.int64) * d + columns
    tl.store(to, acc.to(dx.dtype.element_ty), mask=(numbers < n_rows) & (columns < d))


def _a_configs(arch, arguments):
    ranks = max(16, power_of_2(arguments["rank"]))

    def config(most, n, k, warps, stages):
        return triton.Config({"BLOCK_R": min(ranks, most), "BLOCK_N": n, "BLOCK_K": k}, warps, stages)

    if arch == 0:
        return [config(64, 64, 32, 4, 1)]
    if arguments["x"].dtype == torch.float32:
        return [config(32, 64, 32, 4, 2)]
    # Each tile computes the masks of its part of x; tiles wide in ranks compute them fewer times.
    return [config(256 if ranks > 128 else 128, 64, 64, 8, 3), config(128, 128, 64, 8, 3)]


@kernel(_a_configs, key=("d", "rank", "size_class"))
@triton.jit
def _a_gradient(
    x, gb, q_rows, seed, parts, n_queries, n_rows, d, rank, x_stride, gb_stride, gb_v, threshold, keep_scale,
    size_class, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum (s G B)^T x under the masks over a part of the rows; the second axis has q's tiles, then v's."""
    tiles = tl.cdiv(rank, BLOCK_R)
    which = tl.program_id(1) // tiles
    ranks = tl.program_id(1) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.where(which == 0, n_queries, n_rows)
    share = tl.cdiv(tl.cdiv(count, tl.num_programs(2)), BLOCK_K) * BLOCK_K
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, count)
    left = gb + which.to(tl.int64) * gb_v + ranks[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        numbers = start + tl.arange(0, BLOCK_K)
        inside = (numbers < end)[:, None]
        rows = query_rows(tl.minimum(numbers, end - 1), q_rows, n_queries, which == 0)[:, None]
        g = load(left + numbers[:, None].to(tl.int64) * gb_stride, inside & (ranks < rank)[None, :])
        values = load(x + rows * x_stride + columns[None, :], inside & (columns < d)[None, :])
        values = tl.where(kept(row_keys(seed, which, rows), columns[None, :], threshold), values, 0.0)
        acc = tl.dot(tl.trans(g), values, acc, input_precision=PRECISION)
    to = parts + ((tl.program_id(2) * 2 + which) * rank + ranks)[:, None].to(tl.int64) * d + columns[None, :]
    tl.store(to, acc * keep_scale, mask=(ranks < rank)[:, None] & (columns < d)[None, :])


def _gradients_before(
    o: Operands, xa: Adapters | None, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Adapters | None]:
    """Return G of q and of k, each as a matrix, and s G B of q and v (None without LoRA)."""
    before = (None, None) if o.qk_norm is None else run(o, xa, finished=False)[:2]
    gq, gk = o.x.new_empty(o.n_queries, o.q_width), o.x.new_empty(o.n_rows, o.kv_width)
    norms = (None, None) if o.qk_norm is None else o.qk_norm
    gb = Adapters(o) if o.rank else None
    b = (None, None) if o.lora_b is None else o.lora_b.split((o.q_width, o.kv_width))

    def grid(a):
        longest = max(o.n_queries, o.n_rows)
        return cdiv(longest, a["BLOCK_M"]), 3 if o.rank else 2, max(1, cdiv(o.rank, a["BLOCK_R"]))

    _undo(
        grid, dq=dq, dk=dk, dv=dv, q_before=before[0], k_before=before[1], gq=gq, gk=gk, cos=o.cos, sin=o.sin,
        q_norm=norms[0], k_norm=norms[1], b_q=b[0], b_v=b[1], gb_q=gb and gb.q, gb_v=gb and gb.v, q_rows=o.q_rows,
        n_queries=o.n_queries, n_rows=o.n_rows, q_heads=o.q_heads, kv_heads=o.kv_heads, rank=o.rank,
        b_stride=0 if o.lora_b is None else o.lora_b.stride(0), gb_stride=gb.stride if gb else 0, scale=o.scale,
        eps=o.eps, size_class=o.size_class, HALF=o.head_dim // 2, PRECISION=o.precision,
    )  # fmt: skip
    return gq, gk, gb


def _gradient_of_x(
    o: Operands, gq: torch.Tensor, gk: torch.Tensor, gv: torch.Tensor, gb: Adapters | None
) -> torch.Tensor:
    dx = torch.empty_like(o.x, memory_format=torch.contiguous_format)
    inverse = None
    if o.q_rows is not None:  # number of the query of each row of x, -1 for none
        inverse = o.q_rows.new_full((o.n_rows,), -1)
        inverse.scatter_(0, o.q_rows, torch.arange(o.n_queries, device=o.x.device))
    w = o.weight.split((o.q_width, o.kv_width, o.kv_width))
    a = (None, None) if o.lora_a is None else o.lora_a.chunk(2)
    _input_gradient(
        lambda a: (cdiv(o.n_rows, a["BLOCK_M"]) * cdiv(o.d, a["BLOCK_N"]),),
        gq=gq, gk=gk, gv=gv, w_q=w[0], w_k=w[1], w_v=w[2], gb_q=gb and gb.q, gb_v=gb and gb.v, a_q=a[0], a_v=a[1],
        inverse=inverse, seed=o.seed, dx=dx, n_rows=o.n_rows, d=o.d, q_width=o.q_width, kv_width=o.kv_width,
        rank=o.rank, w_stride=o.weight.stride(0), gb_stride=gb.stride if gb else 0,
        a_stride=0 if o.lora_a is None else o.lora_a.stride(0), threshold=o.threshold, keep_scale=o.keep_scale,
        size_class=o.size_class, PRECISION=o.precision,
    )  # fmt: skip
    return dx


def _gradient_of_a(o: Operands, gb: Adapters, dtype: torch.dtype) -> torch.Tensor:
    if o.seed is None:
        if o.q_rows is None:
            return torch.mm(gb.buffer.T, o.x)
        return torch.cat((torch.mm(gb.q.T, o.x.index_select(0, o.q_rows)), torch.mm(gb.v.T, o.x)))
    # The split depends on the size only and parts are added in order, so results are deterministic.
    parts = o.x.new_empty(max(1, min(4, o.n_rows // 512)), 2 * o.rank, o.d, dtype=torch.float32)
    _a_gradient(
        lambda a: (cdiv(o.d, a["BLOCK_N"]), 2 * cdiv(o.rank, a["BLOCK_R"]), parts.shape[0]),
        x=o.x, gb=gb.buffer, q_rows=o.q_rows, seed=o.seed, parts=parts, n_queries=o.n_queries, n_rows=o.n_rows,
        d=o.d, rank=o.rank, x_stride=o.x.stride(0), gb_stride=gb.stride, gb_v=gb.v_offset, threshold=o.threshold,
        keep_scale=o.keep_scale, size_class=o.size_class, PRECISION=o.precision,
    )  # fmt: skip
    return parts.sum(0).to(dtype)


def _gradient_of_b(o: Operands, gq: torch.Tensor, gv: torch.Tensor, xa: Adapters, lora_b: torch.Tensor) -> torch.Tensor:
    out = lora_b.new_empty(lora_b.shape)
    for part, g, product in zip(out.split((o.q_width, o.kv_width)), (gq, gv), (xa.q, xa.v), strict=True):
        torch.addmm(part, g.T, product, beta=0, alpha=o.scale, out=part)
    return out


def lora_qkv_rope_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `lora_qkv_rope_backward` of `icae_fast.ops.lora_qkv_rope.ref`; a row has at most one query."""
    o = Operands(*arguments)
    dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    gv = dv.view(o.n_rows, o.kv_width)
    xa = project(o)
    gq, gk, gb = _gradients_before(o, xa, dq, dk, dv)
    dx = _gradient_of_x(o, gq, gk, gv, gb)
    lora_a, lora_b = arguments[3:5]
    if gb is None or xa is None:
        da, db = (dx.new_empty(0) if t is None else torch.zeros_like(t) for t in (lora_a, lora_b))
        return dx, da, db
    return dx, _gradient_of_a(o, gb, lora_a.dtype), _gradient_of_b(o, gq, gv, xa, lora_b)
