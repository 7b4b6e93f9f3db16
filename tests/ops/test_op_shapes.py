"""Ops at random sizes: rows, columns and depths that end in the middle of every tile."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icae_fast.ops import REGISTRY
from icae_fast.testing import as_tuple, assert_within_budget, to_float64

DTYPES = st.sampled_from([torch.bfloat16, torch.float32])


def check(op, inputs):
    """Check the dispatched op against the error budget of its spec."""
    spec = REGISTRY[op]
    got = as_tuple(getattr(torch.ops.icae_fast, op)(**inputs))
    truth, plain = (as_tuple(r) for r in (spec.reference(**to_float64(inputs)), spec.reference(**inputs, upcast=False)))
    assert_within_budget(spec, "dispatched", got, truth, plain)


def maker(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, std=1.0: (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)


@settings(max_examples=60)
@given(st.integers(0, 140), st.integers(1, 150), st.integers(1, 100), st.booleans(), DTYPES, st.integers(0, 99))
def test_linear(rows, depth, columns, bias, dtype, seed):
    rand = maker(seed, dtype)
    weight = rand(columns, depth, std=depth**-0.5)
    check("linear", {"x": rand(rows, depth), "weight": weight, "bias": rand(columns) if bias else None})


@settings(max_examples=40)
@given(st.integers(0, 140), st.integers(1, 150), st.integers(1, 70), st.booleans(), DTYPES, st.integers(0, 99))
def test_swiglu(rows, depth, size, keep, dtype, seed):
    rand = maker(seed, dtype)
    weight = rand(2 * size, depth, std=2 * depth**-0.5)
    check("swiglu", {"x": rand(rows, depth), "weight": weight, "bias": rand(2 * size), "keep": keep})


@settings(max_examples=40)
@given(
    st.integers(1, 90), st.integers(1, 80), st.integers(1, 3), st.integers(1, 2), st.integers(1, 50),
    st.integers(0, 40), st.data(),
)  # fmt: skip
def test_lora_qkv_rope(rows, depth, group, kv_heads, half, rank, data):
    rand = maker(data.draw(st.integers(0, 99)), dtype := data.draw(DTYPES))
    q_heads, dim, lora = group * kv_heads, 2 * half, rank > 0
    angle = rand(rows, half).float()
    picked = st.none() | st.lists(st.integers(0, rows - 1), max_size=30)
    q_rows = data.draw(picked)
    seed = torch.tensor(5) if data.draw(st.booleans()) else None
    check("lora_qkv_rope", {
        "x": rand(rows, depth),
        "weight": rand((q_heads + 2 * kv_heads) * dim, depth, std=depth**-0.5),
        "bias": rand((q_heads + 2 * kv_heads) * dim) if data.draw(st.booleans()) else None,
        "lora_a": rand(2 * rank, depth, std=depth**-0.5) if lora else None,
        "lora_b": rand((q_heads + kv_heads) * dim, rank, std=max(rank, 1) ** -0.5) if lora else None,
        "cos": angle.cos(), "sin": angle.sin(),
        "qk_norm": 1 + rand(2, dim, std=0.1) if data.draw(st.booleans()) else None,
        "q_rows": None if q_rows is None else torch.tensor(q_rows, dtype=torch.int64),
        "dropout_seed": seed, "num_q_heads": q_heads, "num_kv_heads": kv_heads, "lora_scale": 0.3,
        "norm_eps": 1e-6, "dropout_p": 0.0 if seed is None else 0.2,
    })  # fmt: skip
    assert dtype in REGISTRY["lora_qkv_rope"].dtypes["cpp"]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 300)), max_size=4), st.integers(1, 5), st.integers(1, 2),
    st.integers(1, 80), st.sampled_from([0, 0, 1, 50]), st.floats(0.05, 8.0), DTYPES, st.integers(0, 99),
)  # fmt: skip
def test_varlen_attention(rows, group, kv_heads, dim, window, spread, dtype, seed):
    """`spread` widens the scores, so that the softmax's shift is raised and weights underflow."""
    rand = maker(seed, dtype)
    lq, lk = [q for q, _ in rows], [k for _, k in rows]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lq, lk))
    check("varlen_attention", {
        "q": rand(sum(lq), group * kv_heads, dim), "k": rand(sum(lk), kv_heads, dim), "v": rand(sum(lk), kv_heads, dim),
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_k": None, "max_seqlen_q": max(lq, default=0),
        "max_seqlen_k": max(lk, default=0), "scale": spread * dim**-0.5, "window": window,
    })  # fmt: skip
