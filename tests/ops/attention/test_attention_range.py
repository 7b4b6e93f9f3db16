"""Attention is as accurate for huge, tiny and mixed magnitudes of values as for ordinary ones."""

import pytest
import torch

from icae_fast.backbone.rows import cumulative
from icae_fast.ops import REGISTRY, backends, call_backend

SPEC = REGISTRY["varlen_attention"]
TOKENS, HEADS, GROUP, DIM = 300, 2, 3, 64

bf16_and_fp32 = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
each_backend = pytest.mark.parametrize("backend", [b for b in backends(SPEC) if b != "reference"])

SIZES = {
    "smallest": torch.full((TOKENS, 1, 1), 2.0**-100),
    "tiny": torch.full((TOKENS, 1, 1), 1e-30),
    "huge": torch.full((TOKENS, 1, 1), 1e34),
    "by dimension": torch.logspace(-30, 30, DIM).view(1, 1, DIM),
    "by key": torch.exp(2 * torch.randn(TOKENS, 1, 1, generator=torch.Generator().manual_seed(1))),
    "growing": torch.logspace(-9, 9, TOKENS).view(TOKENS, 1, 1),
    "zero in some dimensions": (torch.arange(DIM) % 3 > 0).float().view(1, 1, DIM),
}


def draw(dtype, dim=DIM, spread=1.0):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(TOKENS, HEADS * GROUP, dim, generator=g) * spread
    k, v = (torch.randn(TOKENS, HEADS, dim, generator=g) for _ in range(2))
    return q.to(dtype), k.to(dtype), v


def attend(backend, q, k, v):
    cu = cumulative([len(q)])
    arguments = (q, k, v, cu, cu, None, len(q), len(q), 0.125, 0)
    run = SPEC.reference if backend == "reference" else call_backend(SPEC, backend)
    return run(*arguments)[0]


def error_over_largest(out, q, k, v):
    """Return the largest error, relative to the largest value that the query reads in that dimension.

    Errors below 2^-21 of the largest value that other queries read are ignored, because one of the kernels scales the
    values of 128 keys by a common factor.
    """
    expected = attend("reference", q.double(), k.double(), v.double())
    sizes = v.double().abs().repeat_interleave(GROUP, 1)
    largest = sizes.cummax(0).values
    error = (out.double() - expected).abs() - 2**-21 * sizes.amax(0)
    assert torch.equal(out[largest == 0], torch.zeros_like(out[largest == 0]))
    return (error / largest.clamp(min=1e-300)).max().item()


@each_backend
@bf16_and_fp32
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("size", SIZES)
def test_errors_are_small_beside_the_largest_value_that_is_read(backend, dtype, size, spread, one_thread):
    q, k, v = draw(dtype, spread=spread)
    v = (v * SIZES[size]).to(dtype)
    error = error_over_largest(attend(backend, q, k, v), q, k, v)
    assert error < {torch.bfloat16: 2**-7, torch.float32: 2**-17 * max(1, spread)}[dtype]  # as fp32 rounds scores


@each_backend
@bf16_and_fp32
@pytest.mark.parametrize("dim", [8, 24, 40, 72, 80])
def test_head_dimensions_that_fill_no_vector(backend, dtype, dim, one_thread):
    q, k, v = draw(dtype, dim)
    v = v.to(dtype)
    error = error_over_largest(attend(backend, q, k, v), q, k, v)
    assert error < {torch.bfloat16: 2**-7, torch.float32: 2**-17}[dtype]


@each_backend
@bf16_and_fp32
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e34])
@pytest.mark.parametrize("key", [100, 127, 128, 299])
def test_a_value_changes_nothing_that_was_read_before_it(backend, dtype, value, key, one_thread):
    """A value reaches an earlier query only if a query of the same tile reads it; its weight is then 0."""
    q, k, v = draw(dtype)
    v = v.to(dtype)
    clean = attend(backend, q, k, v)
    v[key, :, 7] = value
    out = attend(backend, q, k, v)
    first = key - 48
    others = [d for d in range(DIM) if d != 7]
    assert torch.equal(out[..., others], clean[..., others])
    if abs(value) < float("inf"):
        assert torch.isfinite(out).all()
    else:
        assert torch.equal(out[:first], clean[:first])
        assert not out[key:, :, 7].isfinite().any()
