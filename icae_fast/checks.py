"""Checks of argument values that every room uses."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU, by torch on the CPU, or in Python or C++."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in ("allocate memory", "std::bad_alloc"))


def is_int(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number of at most 64 bits; booleans and tensors are not."""
    if isinstance(value, (bool, torch.Tensor)):
        return False
    try:
        return -(2**63) <= operator.index(value) < 2**63
    except TypeError:  # a NumPy array has `__index__` too, which raises unless it is a scalar
        return False
