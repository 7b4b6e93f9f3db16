"""Comparison of saved and loaded adapters."""

import torch


def assert_same(one, other, ids):
    """Assert equal trained tensors and equal slots of a context."""
    for (name, a), (_, b) in zip(one.reference_named_parameters(), other.reference_named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(one.compress(ids)[0].slots, other.compress(ids)[0].slots)
