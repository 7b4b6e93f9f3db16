"""Checks of argument values that every room uses."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch


def is_int(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number of at most 64 bits; booleans and tensors are not."""
    if isinstance(value, (bool, torch.Tensor)):
        return False
    try:
        return -(2**63) <= operator.index(value) < 2**63
    except TypeError:  # a NumPy array has `__index__` too, which raises unless it is a scalar
        return False
