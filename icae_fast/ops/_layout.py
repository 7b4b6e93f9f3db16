"""Where a launcher's tensors have to lie: with elements of a row side by side, and on the device without a wait."""

from __future__ import annotations

import torch


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where its last dimension is strided."""
    return t if t.stride(-1) == 1 else t.contiguous()


def upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table made on the host, on `device`; a GPU takes it from pinned memory, so nobody waits."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def cdiv(n: int, size: int) -> int:
    """How many pieces of `size` cover n; Triton's own serves kernels too, at 2 us a call on the host."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least power of two that is not under n, for n of at least 1."""
    return 1 << (n - 1).bit_length()
