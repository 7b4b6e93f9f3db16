"""What PEFT on today's transformers launches for a layer, one line each: what the kernels' cost is held against.

A LLaMA layer in bf16 with LoRA on q and v, whose factors PEFT keeps in fp32 (`autocast_adapter_dtype`); tests count the
launches of `icae_fast.benchmark.baseline` and compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness.shapes import attention_flops
from icae_fast.benchmark.shapes import ModelShape

WIDE, NARROW = 4, 2  # bytes


@dataclass(frozen=True)
class Step:
    """Launches of one kind.

    Args:
        name: of what; launches: how many; bytes: read and written by all of them; flops: of products;
        fp32: whether the products are in fp32, which tensor cores do not help.
    """

    name: str
    launches: int
    bytes: int
    flops: int = 0
    fp32: bool = False


def unfused_layer(s: ModelShape, rows: Sequence[tuple[int, int]], rank: int) -> list[Step]:
    """A layer over rows of (queries, keys): all of a row's keys but its queries' own come from the cache.

    With rank 0 the adapter is switched off, as for decoding.
    """
    t, keys = sum(q for q, _ in rows), sum(k for _, k in rows)
    d, q, kv, mlp = s.hidden_size, s.q_heads * s.head_dim, s.kv_heads * s.head_dim, s.mlp
    scores = attention_flops(s, list(rows))
    return [
        *_norm("input norm", t, d),
        *_projection("q_proj", t, d, q, rank),
        _product("k_proj", t, d, kv),
        *_projection("v_proj", t, d, kv, rank),
        *_rotary(t, q, kv),
        # DynamicCache puts keys and values into new tensors, the old ones included.
        Step("cache, cat of k and of v", 2, 2 * NARROW * kv * (2 * keys)),
        Step("scaled_dot_product_attention", 1, NARROW * (2 * t * q + 2 * keys * kv), scores),
        _product("o_proj", t, q, d),
        _elementwise("residual add", t * d, 2 * NARROW, NARROW),
        *_norm("post-attention norm", t, d),
        _product("gate_proj", t, d, mlp),
        _elementwise("silu", t * mlp, NARROW, NARROW),
        _product("up_proj", t, d, mlp),
        _elementwise("gate times up", t * mlp, 2 * NARROW, NARROW),
        _product("down_proj", t, mlp, d),
        _elementwise("residual add", t * d, 2 * NARROW, NARROW),
    ]


def unfused_head(s: ModelShape, tokens: int) -> list[Step]:
    """Embedding, final norm and head over all tokens, which the reference runs for encoding as well."""
    d = s.hidden_size
    return [
        _elementwise("embedding", tokens * d, NARROW, NARROW),
        *_norm("final norm", tokens, d),
        _product("lm_head", tokens, d, s.vocabulary),
    ]


def _product(name, t, inner, outer, fp32=False):
    size = WIDE if fp32 else NARROW
    return Step(name, 1, size * (t * inner + inner * outer + t * outer), 2 * t * inner * outer, fp32)


def _elementwise(name, n, read, written):
    return Step(name, 1, n * (read + written))


def _norm(name, t, d):
    n = t * d
    return [
        _elementwise(f"{name}: to fp32", n, NARROW, WIDE),
        _elementwise(f"{name}: square", n, WIDE, WIDE),
        Step(f"{name}: mean", 1, WIDE * (n + t)),
        Step(f"{name}: add eps, rsqrt", 2, 4 * WIDE * t),
        Step(f"{name}: times rsqrt", 1, WIDE * (2 * n + t)),
        _elementwise(f"{name}: to bf16", n, WIDE, NARROW),
        Step(f"{name}: times weight", 1, NARROW * (2 * n + d)),
    ]


def _projection(name, t, d, outer, rank):
    base = _product(name, t, d, outer)
    if not rank:
        return [base]
    return [
        base,
        _elementwise(f"{name}: x to fp32", t * d, NARROW, WIDE),
        _product(f"{name}: LoRA A", t, d, rank, fp32=True),
        _product(f"{name}: LoRA B", t, rank, outer, fp32=True),
        _elementwise(f"{name}: scale", t * outer, WIDE, WIDE),
        _elementwise(f"{name}: add", t * outer, NARROW + WIDE, WIDE),
        _elementwise(f"{name}: to bf16", t * outer, WIDE, NARROW),
    ]


def _rotary(t, q, kv):
    n = t * (q + kv)
    return [
        Step("rotary of q and of k: times cos", 2, n * 2 * NARROW),
        Step("rotary of q and of k: minus a half", 2, n * NARROW),
        Step("rotary of q and of k: cat", 2, n * 2 * NARROW),
        Step("rotary of q and of k: times sin", 2, n * 2 * NARROW),
        Step("rotary of q and of k: add", 2, n * 3 * NARROW),
    ]
