"""The launches of PEFT on current transformers for one layer, to compare the kernels' cost with.

It is a LLaMA layer in bf16 with LoRA on q and v, whose factors PEFT keeps in fp32 (`autocast_adapter_dtype`). A test
compares this list with the launches of `icae_fast.benchmark.baseline`.
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
        name: the operation.
        launches: number of launches.
        bytes: bytes read and written by all of them.
        flops: operations of products.
        fp32: whether the products are in fp32, without tensor cores.
    """

    name: str
    launches: int
    bytes: int
    flops: int = 0
    fp32: bool = False


def unfused_layer(s: ModelShape, rows: Sequence[tuple[int, int]], rank: int) -> list[Step]:
    """Return the launches of one layer.

    Args:
        s: the model.
        rows: (queries, keys) of each row; keys beyond the queries come from the cache.
        rank: LoRA rank; 0 switches the adapter off, as in decoding.
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
        # DynamicCache concatenates old and new keys and values into new tensors.
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
    """Return embedding, final norm and head over all tokens, which the reference runs for encoding too."""
    d = s.hidden_size
    return [
        _elementwise("embedding", tokens * d, NARROW, NARROW),
        *_norm("final norm", tokens, d),
        _product("lm_head", tokens, d, s.vocabulary),
    ]


def _product(name: str, t: int, inner: int, outer: int, fp32: bool = False) -> Step:
    size = WIDE if fp32 else NARROW
    return Step(name, 1, size * (t * inner + inner * outer + t * outer), 2 * t * inner * outer, fp32)


def _elementwise(name: str, n: int, read: int, written: int) -> Step:
    return Step(name, 1, n * (read + written))


def _norm(name: str, t: int, d: int) -> list[Step]:
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


def _projection(name: str, t: int, d: int, outer: int, rank: int) -> list[Step]:
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


def _rotary(t: int, q: int, kv: int) -> list[Step]:
    n = t * (q + kv)
    return [
        Step("rotary of q and of k: times cos", 2, n * 2 * NARROW),
        Step("rotary of q and of k: minus a half", 2, n * NARROW),
        Step("rotary of q and of k: cat", 2, n * 2 * NARROW),
        Step("rotary of q and of k: times sin", 2, n * 2 * NARROW),
        Step("rotary of q and of k: add", 2, n * 3 * NARROW),
    ]
