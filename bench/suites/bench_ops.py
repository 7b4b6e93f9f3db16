"""Single ops against plain torch, at the shapes of one layer that encodes the case's documents."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from bench.harness.compare import GEMM_BOUND, OURS, Work
from bench.harness.models import SEED
from bench.harness.shapes import Case, attention_flops, qkv_flops
from icae_fast.backbone.rows import cumulative
from icae_fast.benchmark.checks import assert_same
from icae_fast.ops import lora_qkv_rope, varlen_attention

MODES = ("fwd", "fwd_bwd")
# A single op rounds only a few times.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _random(
    generator: torch.Generator, dtype: torch.dtype, *shape: int, std: float = 1.0, grad: bool = False
) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator) * std).to(dtype).requires_grad_(grad)


def _run(
    forward: Callable[[], Sequence[torch.Tensor]],
    leaves: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    mode: str,
) -> Callable[[], list[torch.Tensor]]:
    """Return a call that runs `forward`, in mode "fwd_bwd" also the backward, and returns outputs and gradients."""

    def call() -> list[torch.Tensor]:
        if mode == "fwd":
            with torch.no_grad():
                return list(forward())
        outputs = forward()
        return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]

    return call


def _check_all(case: Case, names: Sequence[str]) -> Callable[[dict[str, list[torch.Tensor]]], None]:
    def check(results: dict[str, list[torch.Tensor]]) -> None:
        for provider, tensors in results.items():
            for name, a, b in zip(names, tensors, results["torch"], strict=False):
                assert_same(a, b, case.torch_dtype, f"{name} of {provider}", TOLERANCE[case.torch_dtype])

    return check


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Run torch's attention for one row, (Lq, Hq, D) against (Lk, Hkv, D)."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("queries", ["all", "memory"])
def test_varlen_attention(compare, case, queries, mode):
    s, k_slots, dtype = case.shape, case.memory_size, case.torch_dtype
    rows = [(n + k_slots if queries == "all" else k_slots, n + k_slots) for n in case.span_lengths]
    lq, lk = [q for q, _ in rows], [k for _, k in rows]
    g = torch.Generator().manual_seed(SEED)
    grad = mode == "fwd_bwd"
    q = _random(g, dtype, sum(lq), s.q_heads, s.head_dim, grad=grad)
    k, v = (_random(g, dtype, sum(lk), s.kv_heads, s.head_dim, grad=grad) for _ in "kv")
    dout = _random(g, dtype, *q.shape)
    cu_q, cu_k = cumulative(lq), cumulative(lk)
    masks = [None if a == b else torch.ones(a, b, dtype=torch.bool).tril(b - a) for a, b in rows]

    def torch_forward():
        parts = zip(q.split(lq), k.split(lk), v.split(lk), masks, strict=True)
        return (torch.cat([_sdpa(*part) for part in parts]),)

    def our_forward():
        return varlen_attention(q, k, v, cu_q, cu_k, max(lq), max(lk), scale=s.head_dim**-0.5)[:1]

    flops = attention_flops(s, rows)
    compare(
        {"torch": _run(torch_forward, (q, k, v), (dout,), mode), OURS: _run(our_forward, (q, k, v), (dout,), mode)},
        _check_all(case, ("out", "dq", "dk", "dv")),
        # The backward has five such products, the forward two.
        Work(GEMM_BOUND[dtype], flops=flops if mode == "fwd" else flops * 7 // 2, tokens=sum(lk)),
        ops=("varlen_attention", "varlen_attention_backward")[: 1 + grad],
        case=case.name,
        queries=queries,
        mode=mode,
    )


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE as Hugging Face's modeling_llama does: x (T, H, D), cos and sin (T, 1, D)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


@pytest.mark.parametrize("mode", MODES)
def test_lora_qkv_rope(compare, case, mode):
    s, r, dtype = case.shape, case.rank, case.torch_dtype
    tokens = sum(case.span_lengths) + case.memory_size * len(case.span_lengths)
    d, nq, nkv, scale = s.hidden_size, s.q_heads * s.head_dim, s.kv_heads * s.head_dim, 0.25
    g, grad = torch.Generator().manual_seed(SEED), mode == "fwd_bwd"
    x = _random(g, dtype, tokens, d, grad=grad)
    weight = _random(g, dtype, nq + 2 * nkv, d, std=d**-0.5)
    a = _random(g, dtype, 2 * r, d, std=d**-0.5, grad=grad)
    b = _random(g, dtype, nq + nkv, r, std=0.02, grad=grad)
    angle = torch.rand(tokens, s.head_dim // 2, generator=g) * 6.28
    cos, sin = angle.cos(), angle.sin()
    wide = [torch.cat((t, t), dim=-1)[:, None].to(dtype) for t in (cos, sin)]
    gradients = [_random(g, dtype, tokens, h, s.head_dim) for h in (s.q_heads, s.kv_heads, s.kv_heads)]
    wq, wk, wv = weight.split((nq, nkv, nkv))

    def heads(q, k, v):
        q, k, v = (t.unflatten(-1, (-1, s.head_dim)) for t in (q, k, v))
        return _rope(q, *wide), _rope(k, *wide), v

    def torch_forward():
        (aq, av), (bq, bv) = a.chunk(2), b.split((nq, nkv))
        q = F.linear(x, wq) + scale * F.linear(F.linear(x, aq), bq)
        v = F.linear(x, wv) + scale * F.linear(F.linear(x, av), bv)
        return heads(q, F.linear(x, wk), v)

    def our_forward():
        sizes = {"num_q_heads": s.q_heads, "num_kv_heads": s.kv_heads}
        return lora_qkv_rope(x, weight, None, a, b, cos, sin, lora_scale=scale, **sizes)

    calls = {"torch": _run(torch_forward, (x, a, b), gradients, mode)}
    if not grad:  # merged weights cannot be trained
        aq, av = a.chunk(2)
        bq, bv = b.split((nq, nkv))
        merged = torch.cat((wq + scale * bq @ aq, wk, wv + scale * bv @ av))
        calls["merged"] = _run(lambda: heads(*F.linear(x, merged).split((nq, nkv, nkv), -1)), (), (), mode)
    flops = qkv_flops(s, tokens, r)
    frozen = 2 * tokens * d * (nq + 2 * nkv)  # base weights have no gradient: one product for x and none for W
    compare(
        {**calls, OURS: _run(our_forward, (x, a, b), gradients, mode)},
        _check_all(case, ("q", "k", "v", "dx", "dlora_a", "dlora_b")),
        Work(GEMM_BOUND[dtype], flops=3 * flops - frozen if grad else flops, tokens=tokens),
        ops=("lora_qkv_rope", "lora_qkv_rope_backward")[: 1 + grad],
        case=case.name,
        mode=mode,
    )
