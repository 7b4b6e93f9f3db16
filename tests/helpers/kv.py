"""Keys and values of Hugging Face's own model, and comparisons with them."""

import torch
from transformers import DynamicCache

LENGTHS = (1, 4, 3, 2)  # of the pieces that `make_pieces` returns


def hf_path(base, pieces):
    """Return keys and values (n_layers, total, Hkv, D) of the Hugging Face model reading all pieces at once."""
    cache = DynamicCache()
    with torch.no_grad():
        base(inputs_embeds=torch.cat(list(pieces))[None], past_key_values=cache)
    return tuple(
        torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in cache.layers]) for name in ("keys", "values")
    )


def assert_same(got, expected):
    """Assert equality to 1e-5 of the largest value."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_path(segments, pieces, expected):
    """Assert one contiguous segment a piece, each with its start, and the expected keys and values over all pieces."""
    assert [s.length for s in segments] == [len(p) for p in pieces]
    assert [s.start for s in segments] == [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    assert all(t.transpose(1, 2).is_contiguous() for s in segments for t in (s.keys, s.values))
    assert_same(torch.cat([s.keys for s in segments], 1), expected[0])
    assert_same(torch.cat([s.values for s in segments], 1), expected[1])
