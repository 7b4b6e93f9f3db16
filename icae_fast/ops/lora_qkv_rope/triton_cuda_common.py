"""Operands, tile order and `x A^T`, shared by the Triton kernels of `lora_qkv_rope`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from icae_fast.ops._layout import cdiv, power_of_2, unit_stride
from icae_fast.ops._triton import kernel
from icae_fast.ops.lora_qkv_rope.triton_cuda_dropout import kept, row_keys


class Operands:
    """The op's arguments in the layouts that the kernels need, and the sizes that follow from them."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_a: torch.Tensor | None,
        lora_b: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, qk_norm: torch.Tensor | None,
        q_rows: torch.Tensor | None, dropout_seed: torch.Tensor | None, num_q_heads: int, num_kv_heads: int,
        lora_scale: float, norm_eps: float, dropout_p: float,
    ) -> None:  # fmt: skip
        self.rank = 0 if lora_a is None else lora_a.shape[0] // 2
        self.x, self.weight = unit_stride(x), unit_stride(weight)
        self.lora_a, self.lora_b = (unit_stride(t) if t is not None and self.rank else None for t in (lora_a, lora_b))
        self.bias, self.qk_norm, self.q_rows = (t if t is None else t.contiguous() for t in (bias, qk_norm, q_rows))
        self.cos, self.sin = cos.contiguous(), sin.contiguous()
        self.q_heads, self.kv_heads = num_q_heads, num_kv_heads
        self.head_dim = weight.shape[0] // (num_q_heads + 2 * num_kv_heads)
        self.q_width, self.kv_width = num_q_heads * self.head_dim, num_kv_heads * self.head_dim
        self.n_rows, self.d = x.shape
        self.n_queries = self.n_rows if q_rows is None else q_rows.shape[0]
        self.scale, self.eps = float(lora_scale), float(norm_eps)  # callers may pass integers
        self.seed = dropout_seed if self.rank and dropout_p else None
        self.threshold = int(dropout_p * 2**32)
        self.keep_scale = 1.0 / (1.0 - dropout_p) if self.seed is not None else 1.0

    @property
    def precision(self) -> str:
        """Input precision of matrix products: full fp32 for fp32, not TF32."""
        return "ieee" if self.x.dtype == torch.float32 else "tf32"

    @property
    def size_class(self) -> int:
        """Tuning key of the number of rows: its bit length, so that sizes within a factor of two share a choice."""
        return self.n_rows.bit_length()


class Adapters:
    """Two matrices of `rank` columns, for q and for v, in one buffer: `x A^T`, or the gradients' product with B.

    They are side by side if every row has a query, so that one plain product computes both, and otherwise one above the
    other.
    """

    def __init__(self, o: Operands) -> None:
        beside = o.q_rows is None
        shape = (o.n_rows, 2 * o.rank) if beside else (o.n_queries + o.n_rows, o.rank)
        self.buffer = o.x.new_empty(shape)
        self.stride = shape[1]
        self.v_offset = o.rank if beside else o.n_queries * o.rank
        self.q = self.buffer[:, : o.rank] if beside else self.buffer[: o.n_queries]
        self.v = self.buffer[:, o.rank :] if beside else self.buffer[o.n_queries :]


@triton.jit
def load(pointers, mask):
    """Load values where the mask is true or None, and 0 elsewhere."""
    if mask is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask, other=0.0)
    return values


@triton.jit
def grouped(tile, rows, columns, GROUP: tl.constexpr):
    """Return a tile's row and column in an order that goes down GROUP rows before the next column, to reuse L2."""
    first = tile // (GROUP * columns) * GROUP
    within = tile % (GROUP * columns)
    height = tl.minimum(rows - first, GROUP)
    return first + within % height, within // height


@triton.jit
def query_rows(numbers, q_rows, n_queries, is_query):
    """Return rows of x from their numbers among the queries or among all rows."""
    rows = numbers.to(tl.int64)
    if q_rows is not None:
        chosen = tl.load(q_rows + numbers, mask=numbers < tl.where(is_query, n_queries, 0), other=0)
        rows = tl.where(is_query, chosen, rows)
    return rows


def project_configs(arch, arguments):
    """Return configurations for `x A^T`, with tiles as wide as the rank because each computes the masks of its part."""
    rank, d = arguments["rank"], arguments["d"]
    width = max(16, power_of_2(rank))

    def config(m, r, k, warps, stages):
        blocks = {"BLOCK_M": m, "BLOCK_R": min(width, r), "BLOCK_K": k, "EVEN_K": d % k == 0}
        return triton.Config(blocks, num_warps=warps, num_stages=stages)

    if arch == 0:
        return [config(32, 64, 64, 4, 1)]
    if arguments["x"].dtype == torch.float32:
        return [config(32, 64, 32, 4, 2)]
    large = config(64, 256, 64, 8, 3) if width > 128 else config(128, 128, 32 if arch < 90 else 64, 8, 3)
    return [config(64, 128, 64, 4, 3), config(32, 128, 64, 4, 3), large]


@kernel(project_configs, key=("d", "rank", "size_class"))
@triton.jit
def _project(
    x, lora_a, q_rows, seed, out, n_queries, n_rows, d, rank, x_stride, a_stride, out_stride, v_offset,
    threshold, keep_scale, size_class, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    query_tiles = tl.cdiv(n_queries, BLOCK_M)
    is_query = tile < query_tiles
    which = tl.where(is_query, 0, 1)
    count = tl.where(is_query, n_queries, n_rows)
    numbers = tl.where(is_query, tile, tile - query_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = query_rows(tl.minimum(numbers, count - 1), q_rows, n_queries, is_query)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    left = x + rows[:, None] * x_stride
    right = lora_a + (which * rank + tl.minimum(ranks, rank - 1))[None, :].to(tl.int64) * a_stride
    if seed is not None:
        keys = row_keys(seed, which, rows)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, d, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        a = load(left + columns[None, :], None if EVEN_K else (columns < d)[None, :])
        b = load(right + columns[:, None], None if EVEN_K else (columns < d)[:, None])
        if seed is not None:
            a = tl.where(kept(keys, columns[None, :], threshold), a, 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    pointers = out + which.to(tl.int64) * v_offset + numbers[:, None].to(tl.int64) * out_stride + ranks[None, :]
    inside = (numbers < count)[:, None] & (ranks < rank)[None, :]
    tl.store(pointers, (acc * keep_scale).to(out.dtype.element_ty), mask=inside)


def project(o: Operands) -> Adapters | None:
    """Return `x A^T` for q and v in x's dtype, with dropout and row selection applied inline; None without LoRA."""
    lora_a = o.lora_a
    if lora_a is None:
        return None
    out = Adapters(o)
    if o.seed is None and o.q_rows is None:
        torch.mm(o.x, lora_a.T, out=out.buffer)
        return out
    _project(
        lambda a: (
            cdiv(o.n_queries, a["BLOCK_M"]) + cdiv(o.n_rows, a["BLOCK_M"]),
            cdiv(o.rank, a["BLOCK_R"]),
        ),
        x=o.x, lora_a=lora_a, q_rows=o.q_rows, seed=o.seed, out=out.buffer, n_queries=o.n_queries, n_rows=o.n_rows,
        d=o.d, rank=o.rank, x_stride=o.x.stride(0), a_stride=lora_a.stride(0), out_stride=out.stride,
        v_offset=out.v_offset, threshold=o.threshold, keep_scale=o.keep_scale, size_class=o.size_class,
        PRECISION=o.precision,
    )  # fmt: skip
    return out
