"""`rms_norm` and its gradient in Triton: residual add, statistics and norm in one read and one write of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from icae_fast.ops._layout import power_of_2, unit_stride
from icae_fast.ops._triton import kernel, load_row

# Wider rows are processed in several blocks.
_MAX_BLOCK = 8192


def _configs(arch, arguments):
    block = min(power_of_2(max(arguments["d"], 1)), 64 if arch == 0 else _MAX_BLOCK)
    return [triton.Config({"BLOCK": block}, num_warps=max(1, min(16, block // 512)), num_stages=1)]


@kernel(_configs, key=("d",))
@triton.jit
def _forward(x, residual, weight, y, total, d, eps, x_stride, residual_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = load_row(x + row * x_stride, columns, d)
        if residual is not None:
            narrow = (value + load_row(residual + row * residual_stride, columns, d)).to(total.dtype.element_ty)
            tl.store(total + row * d + columns, narrow, mask=columns < d)
            value = narrow.to(tl.float32)
        squares += value * value
    inverse = tl.rsqrt(tl.sum(squares) / d + eps)
    for start in range(0, d, BLOCK):  # the row is cached by now
        columns = start + tl.arange(0, BLOCK)
        value = load_row(x + row * x_stride, columns, d)
        if residual is not None:
            value += load_row(residual + row * residual_stride, columns, d)
            value = value.to(total.dtype.element_ty).to(tl.float32)
        value *= inverse * load_row(weight, columns, d)
        tl.store(y + row * d + columns, value.to(y.dtype.element_ty), mask=columns < d)


@kernel(_configs, key=("d",))
@triton.jit
def _backward(dy, dsum, total, weight, dx, d, eps, dy_stride, dsum_stride, total_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = load_row(total + row * total_stride, columns, d)
        squares += value * value
        products += value * load_row(weight, columns, d) * load_row(dy + row * dy_stride, columns, d)
    inverse = tl.rsqrt(tl.sum(squares) / d + eps)
    along = inverse * inverse * inverse * (tl.sum(products) / d)
    for start in range(0, d, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        grad = load_row(weight, columns, d) * load_row(dy + row * dy_stride, columns, d)
        grad = inverse * grad - along * load_row(total + row * total_stride, columns, d)
        if dsum is not None:
            grad += load_row(dsum + row * dsum_stride, columns, d)
        tl.store(dx + row * d + columns, grad.to(dx.dtype.element_ty), mask=columns < d)


def rms_norm(x, residual, weight, eps):
    """Compute `icae_fast.ops.rms_norm`."""
    x, residual = unit_stride(x), residual if residual is None else unit_stride(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    _forward(
        (x.shape[0],), x=x, residual=residual, weight=weight, y=y, total=total, d=x.shape[1], eps=float(eps),
        x_stride=x.stride(0), residual_stride=0 if residual is None else residual.stride(0),
    )  # fmt: skip
    return y, total


def rms_norm_backward(dy, dsum, total, weight, eps):
    """Compute `rms_norm_backward` of `icae_fast.ops.rms_norm.ref`."""
    dy, dsum, total = unit_stride(dy), dsum if dsum is None else unit_stride(dsum), unit_stride(total)
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    _backward(
        (total.shape[0],), dy=dy, dsum=dsum, total=total, weight=weight, dx=dx, d=total.shape[1], eps=float(eps),
        dy_stride=dy.stride(0), dsum_stride=0 if dsum is None else dsum.stride(0), total_stride=total.stride(0),
    )  # fmt: skip
    return dx
