"""`swiglu` and its gradient on CUDA: products by cuBLAS, the activation in Triton with one read and one write.

The activation is not an epilogue of the product. An epilogue would save writing and reading (T, 2 m) once: for
Llama-2-7B with 8192 tokens in bf16 some 0.7 GB, 12 % of the product's time on an H100. cuBLAS is expected to beat a
Triton product by more than that; this has not been measured, and `make gpu-check` decides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from icae_fast.ops._layout import cdiv, power_of_2, unit_stride
from icae_fast.ops._triton import kernel, load_row

_BLOCK = 1024


def _configs(arch, arguments):
    block = min(power_of_2(max(arguments["size"], 1)), 512 if arch == 0 else _BLOCK)
    return [triton.Config({"BLOCK": block}, num_warps=max(1, min(4, block // 256)), num_stages=1)]


@kernel(_configs, key=("size",))
@triton.jit
def _forward(gate_up, y, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = load_row(gate_up + row * (2 * size), columns, size)
    up = load_row(gate_up + row * (2 * size) + size, columns, size)
    value = gate * tl.sigmoid(gate) * up
    tl.store(y + row * size + columns, value.to(y.dtype.element_ty), mask=columns < size)


@kernel(_configs, key=("size",))
@triton.jit
def _backward(dy, gate_up, gradient, size, dy_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = load_row(gate_up + row * (2 * size), columns, size)
    up = load_row(gate_up + row * (2 * size) + size, columns, size)
    grad = load_row(dy + row * dy_stride, columns, size)
    s = tl.sigmoid(gate)
    of_gate, of_up = grad * up * s * (1 + gate * (1 - s)), grad * gate * s
    at = gradient + row * (2 * size) + columns
    tl.store(at, of_gate.to(gradient.dtype.element_ty), mask=columns < size)
    tl.store(at + size, of_up.to(gradient.dtype.element_ty), mask=columns < size)


def activation(gate_up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` of (T, 2 m) products, rounded once."""
    t, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(t, size)
    _forward(lambda c: (t, cdiv(size, c["BLOCK"])), gate_up=gate_up, y=y, size=size)
    return y


def swiglu(x, weight, bias, keep):
    """Compute `icae_fast.ops.swiglu`."""
    gate_up = F.linear(x, weight, bias)
    return activation(gate_up), gate_up if keep else x.new_empty(0)


def swiglu_backward(dy, x, weight, bias, gate_up):
    """Compute `swiglu_backward` of `icae_fast.ops.swiglu.ref`."""
    gate_up = gate_up if gate_up.numel() else F.linear(x, weight, bias)
    t, size = dy.shape
    dy = unit_stride(dy)
    gradient = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    _backward(
        lambda c: (t, cdiv(size, c["BLOCK"])),
        dy=dy, gate_up=gate_up.contiguous(), gradient=gradient, size=size, dy_stride=dy.stride(0),
    )  # fmt: skip
    return gradient @ weight
