"""Softmax where logits are far apart: finite logits of any size, and weights that would be subnormal."""

import pytest
import torch
import torch.nn.functional as F

from icae_fast.backbone.rows import cumulative
from icae_fast.ops import REGISTRY, backends, varlen_attention

SPEC = REGISTRY["varlen_attention"]
HEADS, GROUP, DIM, SCALE = 2, 2, 64, 0.13

pytestmark = pytest.mark.skipif("cpp" not in backends(SPEC), reason="the C++ kernels are not built")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
each_size = pytest.mark.parametrize("size", [1e3, 1e5, 1e8, 1e15])
# Few queries read keys in place, more are cut into tiles.
each_shape = pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 200), (40, 300), (200, 200)])


def draw(queries, keys, dtype):
    g = torch.Generator().manual_seed(3)
    shapes = (queries, HEADS * GROUP, DIM), (keys, HEADS, DIM), (keys, HEADS, DIM)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def attend(q, k, v, scale=SCALE):
    cu_q, cu_k = cumulative([len(q)]), cumulative([len(k)])
    return varlen_attention(q, k, v, cu_q, cu_k, len(q), len(k), scale=scale)[0]


def by_torch(q, k, v):
    heads = [t.repeat_interleave(n, 1).transpose(0, 1)[None] for t, n in ((q, 1), (k, GROUP), (v, GROUP))]
    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=SCALE)[0].transpose(0, 1)


@each_dtype
@each_size
@each_shape
def test_large_logits_as_in_torch(queries, keys, size, dtype):
    q, k, v = draw(queries, keys, dtype)
    q, k = q * size, k * size
    expected = by_torch(q.double(), k.double(), v.double())
    torch.testing.assert_close(
        attend(q, k, v).double(), expected, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )


@each_dtype
@each_size
@pytest.mark.parametrize("queries", [1, 60])
def test_equal_keys_share_the_weight(queries, size, dtype):
    """Equal scores are equal numbers in whatever block of keys they stand."""
    q, k, v = draw(queries, 300, dtype)
    k[5::37] = k[3]
    q = torch.cat([k[3:4].repeat_interleave(GROUP, 1)] * queries) * size
    k = k * size
    expected = v[[3, *range(5, 300 - queries + 1, 37)]].double().mean(0).repeat_interleave(GROUP, 0)
    out = attend(q, k, v)[0].double()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=5e-3 if dtype == torch.bfloat16 else 1e-6)


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_large_logits(size, dtype):
    """One key has all the weight, so dv is the sum of its queries' gradients, and no gradient is infinite or NaN."""
    q, k, v = (t.requires_grad_() for t in draw(40, 300, dtype))
    out = attend(q * size, k * size, v)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    # torch's own gradient of attention is NaN here, so dv is computed from the weights.
    heads = [(t * size).detach().double().transpose(0, 1) for t in (q, k)]
    scores = heads[0] @ heads[1].repeat_interleave(GROUP, 0).transpose(1, 2) * SCALE
    mask = torch.ones(40, 300, dtype=torch.bool).tril(260)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights.transpose(1, 2) @ grad.double().transpose(0, 1)).unflatten(0, (HEADS, GROUP)).sum(1)
    expected = expected.transpose(0, 1)
    torch.testing.assert_close(dv.double(), expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert torch.isfinite(dq).all()
    assert torch.isfinite(dk).all()


@pytest.mark.parametrize("queries", [1, 60])
@pytest.mark.parametrize(
    ("dtype", "gap", "value"),
    [(torch.float32, 92.0, 3e38), (torch.float32, 100.0, 3e38), (torch.float64, 715.0, 1e308)],
    ids=str,
)
def test_subnormal_weights_are_zero(queries, dtype, gap, value):
    """A subnormal weight costs an assist of the CPU in every product; fp32 attention took 50 times as long."""
    q, k, v = (
        torch.zeros(n, h, DIM, dtype=dtype)
        for n, h in (
            (
                queries,
                2,
            ),
            (queries + 1, 1),
            (queries + 1, 1),
        )
    )
    q[..., 0] = 1
    k[0, :, 0] = -gap  # every query reads key 0, whose weight is e^-gap of the others'
    v[0] = value
    assert torch.equal(attend(q, k, v, scale=1.0), torch.zeros_like(q))
    # A weight that is a normal number is kept.
    k[0, :, 0] = -80
    assert (attend(q, k, v, scale=1.0)[0] > 0).all()


def test_the_mode_of_the_cpu_is_restored():
    """Flushing ends with the kernel: torch's own arithmetic has subnormal numbers after it."""
    attend(*draw(40, 40, torch.float32))
    assert torch.tensor(2.0**-140) * 0.5 == 2.0**-141
