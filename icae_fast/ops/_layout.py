"""Tensor layout and upload helpers for kernel launchers."""

from __future__ import annotations

import torch


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """Return the tensor, copied if its last dimension is strided."""
    return t if t.stride(-1) == 1 else t.contiguous()


def upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device`; to a GPU from pinned memory, without synchronisation."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def cdiv(n: int, size: int) -> int:
    """Return ceil(n / size). `triton.cdiv` costs 2 us a call on the host."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """Return the smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()
