"""`shared_prefix_attention` in Triton: one launch for all segments, splits and tails, and one to merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from icae_fast.errors import BackendError
from icae_fast.ops._layout import power_of_2, unit_stride
from icae_fast.ops._lengths import on_host
from icae_fast.ops._triton import kernel
from icae_fast.ops.shared_prefix_attention.plan import ITEM, PIECE, SOURCE, Plan, Shape, plan, sources

_ITEM, _PIECE, _SOURCE = tl.constexpr(ITEM), tl.constexpr(PIECE), tl.constexpr(SOURCE)
_EVERYTHING = tl.constexpr(1 << 30)
# For each BLOCK_M, (keys of a block, stages) without register spills; see `make kernels-check`.
_BLOCKS = {
    16: [(32, 4), (64, 3), (128, 2)],
    32: [(32, 3), (32, 4), (128, 2)],
    64: [(32, 3), (64, 2), (64, 3)],
    128: [(32, 3), (64, 2), (64, 3)],
}
_LOG2_E = 1.4426950408889634


def _attend_configs(arch, arguments):
    if arguments["q"].dtype == torch.float32:
        return [triton.Config({"BLOCK_N": 32}, num_warps=4, num_stages=1)]
    if arch == 0:
        return [triton.Config({"BLOCK_N": 64}, num_warps=4, num_stages=1)]
    tile = arguments["BLOCK_M"], arguments["BLOCK_D"]
    blocks = [(32, 2)] if arch == 89 and tile[1] > 128 else _BLOCKS[tile[0]]  # it has 99 KB of shared memory
    return [
        triton.Config({"BLOCK_N": n}, num_warps=8 if tile[0] * tile[1] >= 128 * 128 else 4, num_stages=stages)
        for n, stages in blocks
        if tile[1] <= 128 or n * stages <= 128
    ]


@triton.jit
def _reach(item, token, places, tail_lengths, n_tokens, WINDOW: tl.constexpr):
    """Return the last key each query sees: its position in the tail, or in the row if a window may hide segments."""
    row, end = tl.load(item + 6), tl.load(item + 1)
    in_row = token * 0 + _EVERYTHING
    if WINDOW > 0:
        rows = tl.load(places + token, mask=token < end, other=0)
        in_row = tl.load(places + n_tokens + token, mask=token < end, other=0) + tl.load(tail_lengths + rows)
    return tl.where(row < 0, in_row, tl.load(tail_lengths + tl.maximum(row, 0)) + token - end)


@triton.jit
def _range(item, piece, tail_starts, tail_lengths, splits, BLOCK_N: tl.constexpr):
    """Return first and end key of an item in one of its pieces, and the position of key 0 in the source."""
    row = tl.load(item + 6)
    # No branch, after which the compiler would lose the alignment of loads.
    length = tl.load(tail_lengths + tl.maximum(row, 0))
    size = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = tl.load(item + 7) * size
    first = tl.where(row < 0, 0, tl.load(tail_starts + tl.maximum(row, 0)))
    end = tl.where(row < 0, tl.load(piece + 2), tl.minimum(begin + size, length))
    return tl.where(row < 0, tl.load(piece + 1), begin), end, first


@triton.jit
def _pointer(source, WHICH: tl.constexpr, like, kv_head, first, layer, ALIGNMENT: tl.constexpr, WIDTH: tl.constexpr):
    """Return a pointer to key `first` of a head, and the stride of keys; WHICH is 0 for keys and 1 for values."""
    stride = tl.multiple_of(tl.load(source + 2 + 3 * WHICH), ALIGNMENT // WIDTH)
    offset = first * stride + kv_head * tl.load(source + 3 + 3 * WHICH) + layer * tl.load(source + 4 + 3 * WHICH)
    address = tl.load(source + WHICH) + offset * WIDTH
    return tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), ALIGNMENT), stride


@kernel(_attend_configs, key=("BLOCK_M", "D", "GROUP", "WINDOW"))
@triton.jit(do_not_specialize=["layer", "n_tokens", "splits"])
def _attend(
    q, sources, items, pieces, places, tail_starts, tail_lengths, partial, lse, layer, n_tokens, splits, scale,
    q_token_stride, q_head_stride, D: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr,
    ALIGNMENT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    item, kv_head = items + tl.program_id(0) * _ITEM, tl.program_id(1)
    row = tl.load(item + 2) + tl.arange(0, BLOCK_M)
    token, head = tl.load(item) + row // GROUP, kv_head * GROUP + row % GROUP
    valid, columns = token < tl.load(item + 1), tl.arange(0, BLOCK_D)
    q_at = token.to(tl.int64) * q_token_stride + head * q_head_stride
    q_mask = valid[:, None] & (columns < D)[None, :]
    q_tile = tl.load(q + q_at[:, None] + columns[None, :], mask=q_mask, other=0.0)
    reach = _reach(item, token, places, tail_lengths, n_tokens, WINDOW)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(tl.load(item + 3), tl.load(item + 4)):
        piece = pieces + i * _PIECE
        source = sources + tl.load(piece) * _SOURCE
        begin, end, first = _range(item, piece, tail_starts, tail_lengths, splits, BLOCK_N)
        at = reach - tl.load(piece + 3)
        end = tl.minimum(end, tl.max(tl.where(valid, at, -1)) + 1)
        if WINDOW > 0:
            begin = tl.maximum(begin, tl.min(tl.where(valid, at, _EVERYTHING)) - (WINDOW - 1))
        k, k_stride = _pointer(source, 0, q, kv_head, first, layer, ALIGNMENT, WIDTH)
        v, v_stride = _pointer(source, 1, q, kv_head, first, layer, ALIGNMENT, WIDTH)
        for start in range(begin, end, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            k_mask = (columns < D)[:, None] & (keys < end)[None, :]
            k_tile = tl.load(k + (keys * k_stride)[None, :] + columns[:, None], mask=k_mask, other=0.0)
            scores = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale
            seen = (keys < end)[None, :] & (keys[None, :] <= at[:, None])
            if WINDOW > 0:
                seen = seen & (keys[None, :] > at[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
            highest = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            weights, shrink = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            v_mask = (keys < end)[:, None] & (columns < D)[None, :]
            v_tile = tl.load(v + (keys * v_stride)[:, None] + columns[None, :], mask=v_mask, other=0.0)
            out = tl.dot(weights.to(v_tile.dtype), v_tile, out * shrink[:, None], input_precision=PRECISION)
            top = highest
    total = tl.where(total == 0, 1.0, total)  # no key was seen, and `top` is -inf
    out = out / total[:, None]
    place = (tl.load(item + 5).to(tl.int64) * n_tokens + token) * (tl.num_programs(1) * GROUP) + head
    tl.store(lse + place, top + tl.log2(total), mask=valid)
    tl.store(partial + place[:, None] * D + columns[None, :], out, mask=q_mask)


def _merge_configs(arch, arguments):
    block = 2 if arch == 0 else min(16, power_of_2(arguments["slots"]))
    return [triton.Config({"BLOCK_P": block}, num_warps=max(1, min(4, block * arguments["BLOCK_D"] // 256)))]


@kernel(_merge_configs, key=("slots",))
@triton.jit
def _merge(partial, lse, out, n_rows, slots, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    top, total = float("-inf"), 0.0
    merged = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, slots, BLOCK_P):
        slot = first + tl.arange(0, BLOCK_P)
        place = slot.to(tl.int64) * n_rows + row
        weight = tl.load(lse + place, mask=slot < slots, other=float("-inf"))
        written = weight != float("-inf")
        highest = tl.maximum(top, tl.max(weight, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight, shrink = tl.exp2(weight - base), tl.exp2(top - base)
        mask = written[:, None] & (columns < D)[None, :]
        part = tl.load(partial + place[:, None] * D + columns[None, :], mask=mask, other=0.0)
        merged = merged * shrink + tl.sum(weight[:, None] * part, 0)
        total = total * shrink + tl.sum(weight, 0)
        top = highest
    merged = merged / tl.where(total == 0, 1.0, total)
    tl.store(out + row * D + columns, merged.to(out.dtype.element_ty), mask=columns < D)


@dataclass(frozen=True)
class Rows:
    """Rows with their plan and buffers, ready for one launch a layer.

    Args:
        plan, sources: tables, see `icae_fast.ops.shared_prefix_attention.plan`.
        alignment: bytes of which every key's and value's address is a multiple.
        partial: (slots, Tq, Hq, D) fp32 partial results.
        lse: (slots, Tq, Hq) fp32 log-sum-exps of the partial results, to base 2; -inf where none is written.
        tail_starts, tail_lengths: (R,) int32.
    """

    plan: Plan
    sources: torch.Tensor
    alignment: int
    partial: torch.Tensor
    lse: torch.Tensor
    tail_starts: torch.Tensor
    tail_lengths: torch.Tensor

    @classmethod
    def of(
        cls, starts: Sequence[int], num_q_heads: int, k: torch.Tensor, v: torch.Tensor, tail_starts: torch.Tensor,
        tail_lengths: torch.Tensor, prefix_keys: Sequence[torch.Tensor], prefix_values: Sequence[torch.Tensor],
        prefix_rows: Sequence[int], windowed: bool,
    ) -> Rows:  # fmt: skip
        """Plan for rows whose queries start at `starts`, on keys and values (N, Hkv, D) or (layers, N, Hkv, D).

        Raises:
            BackendError: the last dimension of keys or values is not contiguous.
        """
        if any(t.stride(-1) != 1 for t in (k, v, *prefix_keys, *prefix_values)):
            raise BackendError("the last dimension of keys or values is not contiguous; pass `.contiguous()` tensors")
        n, num_kv_heads, head_dim = k.shape[-3:]
        width = k.element_size()
        layout = tuple(_layout(*pair) for pair in zip((*prefix_keys, k), (*prefix_values, v), strict=True))
        aligned = all((t.data_ptr() | width * s) % 16 == 0 for t in (k, v, *prefix_keys, *prefix_values)
                      for s in t.stride()[:-1])  # fmt: skip
        shape = Shape(
            tuple(starts), tuple(t.shape[-3] for t in prefix_keys), tuple(prefix_rows), n, num_q_heads // num_kv_heads,
            num_kv_heads, _multiprocessors(k.device), windowed,
        )  # fmt: skip
        planned = plan(shape, k.device, 128 if head_dim <= 128 and k.dtype != torch.float32 else 64)
        size = planned.slots, starts[-1], num_q_heads
        return cls(
            planned, sources(layout, k.device), 16 if aligned else width,
            torch.empty(*size, head_dim, dtype=torch.float32, device=k.device),
            torch.full(size, float("-inf"), dtype=torch.float32, device=k.device), tail_starts, tail_lengths,
        )  # fmt: skip

    def attend(self, q: torch.Tensor, scale: float, window: int, layer: int = 0) -> torch.Tensor:
        """Return the attention (Tq, Hq, D) of one layer's queries."""
        n_tokens, heads, head_dim = q.shape
        q = unit_stride(q)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        block_d = max(16, power_of_2(head_dim))
        items = self.plan.items
        _attend(
            (items.shape[0], heads // self.plan.group), q=q, sources=self.sources, items=items,
            pieces=self.plan.pieces, places=self.plan.places, tail_starts=self.tail_starts,
            tail_lengths=self.tail_lengths, partial=self.partial, lse=self.lse, layer=layer, n_tokens=n_tokens,
            scale=scale * _LOG2_E, q_token_stride=q.stride(0), q_head_stride=q.stride(1), D=head_dim,
            GROUP=self.plan.group, splits=self.plan.tail_splits, WINDOW=window, ALIGNMENT=self.alignment,
            WIDTH=q.element_size(), PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            BLOCK_M=self.plan.block_m, BLOCK_D=block_d,
        )  # fmt: skip
        _merge(
            (n_tokens * heads,), partial=self.partial, lse=self.lse, out=out, n_rows=n_tokens * heads,
            slots=self.plan.slots, D=head_dim, BLOCK_D=block_d,
        )  # fmt: skip
        return out


def shared_prefix_attention(
    q, k, v, cu_seqlens_q, tail_starts, tail_lengths, prefix_keys, prefix_values, prefix_rows, scale, window
):
    """Compute `icae_fast.ops.shared_prefix_attention`."""
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    k, v = unit_stride(k), unit_stride(v)
    prefix_keys, prefix_values = [unit_stride(t) for t in prefix_keys], [unit_stride(t) for t in prefix_values]
    rows = Rows.of(
        on_host(cu_seqlens_q), q.shape[1], k, v, tail_starts, tail_lengths, prefix_keys, prefix_values, prefix_rows,
        window > 0,
    )  # fmt: skip
    return rows.attend(q, scale, window)


def _layout(keys, values):
    """Return a row of the table of sources."""
    strides = [s for t in (keys, values) for s in (t.stride(-3), t.stride(-2), t.stride(0) if t.dim() == 4 else 0)]
    return keys.data_ptr(), values.data_ptr(), *strides


def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
