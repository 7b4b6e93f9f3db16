"""Compute dtype of the references."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def compute_dtype(x: torch.Tensor, upcast: bool) -> torch.dtype:
    """Return fp32 for narrower inputs, the kernels' accumulation dtype; x's dtype if it is wide or without `upcast`."""
    return torch.float32 if upcast and x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run `backward(ctx, *grads)` with autocast off, which a caller of `Tensor.backward` may have on."""

    @functools.wraps(backward)
    def call(ctx: Any, *grads: torch.Tensor | None) -> Any:
        device = next((g.device.type for g in grads if g is not None), "cpu")
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return call
