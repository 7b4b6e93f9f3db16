"""`varlen_attention` in bf16 against torch's own attention on the same rows, at SmolLM2's heads."""

import torch
import torch.nn.functional as F

from bench.harness.compare import GEMM_BOUND, OURS, Work
from bench.harness.encoders import EXPANDED, SDPA
from bench.harness.models import SEED
from bench.harness.shapes import MODELS, attention_flops
from icae_fast.backbone.rows import cumulative
from icae_fast.benchmark.checks import assert_same
from icae_fast.ops import varlen_attention

DTYPE, TOLERANCE = torch.bfloat16, 2e-2  # a single op rounds only a few times


def test_attention(compare, rows):
    shape, n, length = MODELS["smollm2-135m"], rows.count, rows.tokens
    g = torch.Generator().manual_seed(SEED)
    sizes = (shape.q_heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.randn(n, length, heads, shape.head_dim, generator=g).to(DTYPE) for heads in sizes)
    rows_q, rows_k, rows_v = (t.flatten(0, 1) for t in (q, k, v))
    # One batch of equal rows with contiguous heads is torch's best case. Expanding keys and values is not timed.
    heads_q, heads_k, heads_v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    groups = shape.q_heads // shape.kv_heads
    expanded_k, expanded_v = (t.repeat_interleave(groups, dim=1) for t in (heads_k, heads_v))
    cu = cumulative([length] * n)

    @torch.no_grad()
    def sdpa():
        return F.scaled_dot_product_attention(heads_q, heads_k, heads_v, is_causal=True, enable_gqa=True)

    @torch.no_grad()
    def sdpa_expanded():
        return F.scaled_dot_product_attention(heads_q, expanded_k, expanded_v, is_causal=True)

    @torch.no_grad()
    def ours():
        return varlen_attention(rows_q, rows_k, rows_v, cu, cu, length, length, scale=shape.head_dim**-0.5)[0]

    def check(results):
        expected = results[SDPA].transpose(1, 2)
        assert_same(results[EXPANDED].transpose(1, 2), expected, DTYPE, "expanded heads", TOLERANCE)
        assert_same(results[OURS].view_as(q), expected, DTYPE, "icae_fast's rows", TOLERANCE)

    compare(
        {SDPA: sdpa, EXPANDED: sdpa_expanded, OURS: ours},
        check,
        Work(GEMM_BOUND[DTYPE], flops=attention_flops(shape, [(length, length)] * n), tokens=n * length),
        ops=("varlen_attention",),
        rows_by_tokens=rows.name,
    )
