"""Slots in fewer bits: bf16, or int8 with one scale per slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch

from icae_fast.errors import InvalidInputError

SlotDtype = Literal["bfloat16", "int8"]
_LEVELS = 127  # symmetric: -128 is unused


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to 255 even steps of its largest magnitude.

        scale_i = max_j |x_ij| / 127,    q_ij = round(x_ij / scale_i)

    Args:
        x: (n, d), finite, of a floating dtype.

    Returns:
        (n, d) int8, and the scales, (n,) fp32 (fp64 for fp64). No value changes by more than half a scale.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(dim=1) / _LEVELS
    steps = wide / torch.where(scale > 0, scale, 1)[:, None]
    return steps.round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


def dequantize_rows(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `q * scale` for each row.

    Args:
        q: (n, d) int8.
        scale: (n,), from `quantize_rows`.
        dtype: dtype of the result.

    Returns:
        (n, d).
    """
    return (q * scale[:, None]).to(dtype)


def check_slot_dtype(dtype: str | None) -> SlotDtype | None:
    """Return the name of a dtype in which slots can be stored, or None, which stands for their own dtype.

    Raises:
        InvalidInputError: any other name.
    """
    if dtype is not None and dtype not in get_args(SlotDtype):
        raise InvalidInputError(
            f"dtype is {dtype!r}; slots are stored as 'bfloat16', 'int8', or in the dtype that they have (None)"
        )
    return cast("SlotDtype | None", dtype)


def pack_slots(slots: torch.Tensor, dtype: SlotDtype | None) -> dict[str, torch.Tensor]:
    """Return the tensors that store slots (n, d) in a file: `slots`, and for int8 also `slots_scale`."""
    if dtype == "int8":
        return dict(zip(("slots", "slots_scale"), quantize_rows(slots), strict=True))
    return {"slots": slots if dtype is None else slots.to(getattr(torch, dtype))}


def unpack_slots(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the slots of `pack_slots`: int8 slots as a new tensor in `dtype`, all others unchanged."""
    if tensors["slots"].dtype == torch.int8:
        return dequantize_rows(tensors["slots"], tensors["slots_scale"], dtype)
    return tensors["slots"]
