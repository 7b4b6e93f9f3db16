"""The C++ ops refuse bad arguments and compute unusual ones correctly: scales, head counts, tokens outside all rows."""

import re

import pytest
import torch

from helpers.build import call, int32, make_inputs
from icae_fast.ops import EXTENSION_ERROR, REGISTRY

if EXTENSION_ERROR is not None:
    pytest.skip(f"there are no C++ kernels: {EXTENSION_ERROR}", allow_module_level=True)


@pytest.mark.parametrize("op", ["varlen_attention", "varlen_attention_backward"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": int32(0, 9, 5, 12, 24)}, "cu_seqlens_q falls from 9 to 5 at row 1"),
        ({"cu_seqlens_q": int32(0, 8, 16, 33)}, "cu_seqlens_q ends at 33, past the 32 tokens"),
        ({"cu_seqlens_k": int32(0, 72, 93, 1000)}, "cu_seqlens_k ends at 1000"),
        ({"cu_seqlens_k": int32(1, 72, 93, 109)}, "cu_seqlens_k begins with 0"),
        ({"cu_seqlens_k": int32(0, 72, -3, 109)}, "cu_seqlens_k falls"),
        ({"cu_seqlens_q": int32(0, 8)}, "cu_seqlens_q is for 1 rows and cu_seqlens_k for 3"),
        ({"cu_seqlens_q": int32()}, "cu_seqlens_q begins with 0"),
        ({"cu_seqlens_q": torch.tensor([0, 8, 16, 32])}, "cu_seqlens_q is 1-d int32"),
        ({"seqused_k": int32(73, 1, 1)}, "seqused_k is 73 for row 0, which has 72 keys"),
        ({"seqused_k": int32(1, -1, 1)}, "seqused_k is -1 for row 1"),
        ({"seqused_k": int32(1)}, "seqused_k has 1 values for 3 rows"),
        ({"window": -1}, "window is -1"),
        ({"k": torch.zeros(109, 3, 64), "v": torch.zeros(109, 3, 64)}, "4 query heads are no multiple of 3"),
        ({"v": torch.zeros(109, 2, 32)}, "they must agree"),
        ({"k": torch.zeros(109, 2, 64, dtype=torch.bfloat16)}, "k is BFloat16, not Float"),
    ],
)
def test_attention_refuses_what_it_would_read_out_of_bounds(op, change, message):
    inputs = make_inputs(op, "memory-queries") | change
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(op, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rows": torch.tensor([0, 41])}, "q_rows holds 41, but x has 41 rows"),
        ({"q_rows": torch.tensor([-1])}, "q_rows holds -1"),
        ({"q_rows": int32(1)}, "q_rows is 1-d int64"),
        ({"cos": torch.zeros(40, 8)}, "cos is [40, 8], not (41, 8)"),
        ({"weight": torch.zeros(127, 48)}, "an even head_dim for each of 8 heads"),
        ({"lora_a": None}, "given together or not at all"),
        ({"lora_b": torch.zeros(96, 9)}, "lora_a is [16, 48], not (18, 48)"),
        ({"dropout_p": 1.0}, "dropout_p is 1, not in [0, 1)"),
        ({"x": torch.zeros(41, 48, dtype=torch.float16)}, "x is Half; the C++ kernels take float32"),
    ],
)
def test_projection_refuses_arguments_that_do_not_fit(change, message):
    inputs = make_inputs("lora_qkv_rope", "memory-rows") | change
    with pytest.raises((RuntimeError, IndexError), match=re.escape(message)):
        call("lora_qkv_rope", inputs)


def test_tokens_outside_all_rows_are_left_out():
    """cu_seqlens may end before the tensors do, e.g. with a buffer of fixed size."""
    q, k, v = (torch.randn(20, heads, 16) for heads in (4, 2, 2))
    cu, lse_shape = int32(0, 3, 11), (4, 20)
    settings = {"max_seqlen_q": 8, "max_seqlen_k": 8, "scale": 0.25, "window": 0, "seqused_k": None}
    rows = {"cu_seqlens_q": cu, "cu_seqlens_k": cu} | settings
    out, lse = torch.ops.icae_fast.varlen_attention(q, k, v, **rows)
    assert torch.equal(out[11:], torch.zeros(9, 4, 16))
    assert torch.isneginf(lse[:, 11:]).all()
    grads = torch.ops.icae_fast.varlen_attention_backward(
        torch.randn_like(q), torch.randn(lse_shape), q, k, v, out, lse, **rows
    )
    assert all(torch.equal(g[11:], torch.zeros_like(g[11:])) for g in grads)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.5])
def test_any_scale_is_right(scale):
    spec = REGISTRY["varlen_attention"]
    inputs = make_inputs("varlen_attention", "empty-rows", torch.float64) | {"scale": scale}
    for got, truth in zip(call("varlen_attention", inputs), spec.reference(**inputs), strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(71, 1, 5), (1, 1, 1), (6, 1, 256), (10, 2, 72)])
def test_odd_heads(heads, kv_heads, head_dim, dtype):
    """Test more query heads than a tile has lanes, and head sizes that fill no vector."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(70, h, head_dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads))
    cu = int32(0, 69, 70)
    rows = (cu, cu, None, 69, 69, head_dim**-0.5, 0)
    attention, backward = (REGISTRY[n] for n in ("varlen_attention", "varlen_attention_backward"))
    out, lse = torch.ops.icae_fast.varlen_attention(q, k, v, *rows)
    truth = attention.reference(q.double(), k.double(), v.double(), *rows)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.double(), truth[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), truth[1], rtol=tolerance, atol=tolerance)
    grads = (torch.randn(out.shape, generator=generator).to(dtype), torch.randn(lse.shape, generator=generator))
    got = torch.ops.icae_fast.varlen_attention_backward(*grads, q, k, v, out, lse, *rows)
    exact = backward.reference(*(t.double() for t in (*grads, q, k, v, out, lse)), *rows)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance * max(1.0, e.abs().max().item()))
