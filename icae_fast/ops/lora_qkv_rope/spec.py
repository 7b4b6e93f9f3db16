"""Declaration of `lora_qkv_rope` and `lora_qkv_rope_backward`."""

from __future__ import annotations

import torch

from icae_fast.ops._declare import GPU_DTYPES, Gpu, OpSpec, Sample, declare
from icae_fast.ops.lora_qkv_rope import ref

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor cos, Tensor sin, "
    "Tensor? qk_norm, Tensor? q_rows, Tensor? dropout_seed, int num_q_heads, int num_kv_heads, "
    "float lora_scale, float norm_eps, float dropout_p"
)
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _head_dim(weight, num_q_heads, num_kv_heads):
    return weight.shape[0] // (num_q_heads + 2 * num_kv_heads)


def _fake(
    x, weight, bias, lora_a, lora_b, cos, sin, qk_norm, q_rows, dropout_seed,
    num_q_heads, num_kv_heads, lora_scale, norm_eps, dropout_p,
):  # fmt: skip
    head_dim = _head_dim(weight, num_q_heads, num_kv_heads)
    n_queries = x.shape[0] if q_rows is None else q_rows.shape[0]
    return (
        x.new_empty(n_queries, num_q_heads, head_dim),
        x.new_empty(x.shape[0], num_kv_heads, head_dim),
        x.new_empty(x.shape[0], num_kv_heads, head_dim),
    )


def _fake_backward(dq, dk, dv, x, weight, bias, lora_a, lora_b, *_args, **_kwargs):
    empty = x.new_empty(0)
    dx = x.new_empty(x.shape)
    return (dx, empty, x.new_empty(0)) if lora_a is None else (dx, lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape))  # noqa: E501  # fmt: skip


def _setup_context(ctx, inputs, output):
    # Only the inputs are kept: the backward recomputes x A^T and the values before the q/k norm by one small GEMM
    # each, instead of holding (T, 2r) and (T, Hq D + Hkv D) for every layer.
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[10:]


def _backward(ops, ctx, dq, dk, dv):
    saved = ctx.saved_tensors
    dx, da, db = ops.lora_qkv_rope_backward(dq, dk, dv, *saved, *ctx.settings)
    if saved[3] is None:
        da = db = None
    return (dx, None, None, da, db, *[None] * 10)


def _sample(
    name, t, d, hq, hkv, head_dim, rank=8, *, bias=False, norm=False, rows=None, p=0.0, view=False, gradcheck=False
):
    """Return a sample of T tokens; `rows` selects those with a query, `view` makes x a strided slice."""

    def make(dtype, device, generator):
        def rand(*shape, std=1.0):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
            return values.to(dtype).to(device)

        out = (hq + 2 * hkv) * head_dim
        angle = torch.rand(t, head_dim // 2, generator=generator, dtype=torch.float64) * 6.28
        table = torch.float64 if dtype == torch.float64 else torch.float32
        lora = rank > 0
        return {
            "x": rand(t, d + 8)[:, 3 : d + 3] if view else rand(t, d),
            "weight": rand(out, d, std=d**-0.5),
            "bias": rand(out) if bias else None,
            "lora_a": rand(2 * rank, d, std=d**-0.5) if lora else None,
            "lora_b": rand((hq + hkv) * head_dim, rank, std=max(rank, 1) ** -0.5) if lora else None,
            "cos": angle.cos().to(table).to(device),
            "sin": angle.sin().to(table).to(device),
            "qk_norm": 1 + rand(2, head_dim, std=0.1) if norm else None,
            "q_rows": None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device),
            "dropout_seed": torch.tensor(0x1234_5678_9ABC, device=device) if p else None,
            "num_q_heads": hq,
            "num_kv_heads": hkv,
            "lora_scale": 0.25,
            "norm_eps": 1e-6,
            "dropout_p": p,
        }

    return Sample(name, make, gradcheck)


SAMPLES = (
    _sample("gqa", 37, 48, 4, 2, 16, bias=True, gradcheck=False),
    _sample("mha-d64", 64, 96, 2, 2, 64),
    _sample("d80-prime", 31, 100, 3, 1, 80, rank=7),
    _sample("d128-qk_norm", 19, 64, 2, 1, 128, norm=True),
    _sample("one-token", 1, 32, 2, 1, 16),
    _sample("no-token", 0, 32, 2, 1, 16),
    _sample("no-lora", 23, 40, 2, 2, 16, rank=0, bias=True),
    _sample("view", 29, 61, 3, 3, 8, view=True, norm=True),
    _sample("memory-rows", 41, 48, 4, 2, 16, rows=[5, 7, 11, 38, 39, 40], norm=True, bias=True),
    _sample("no-query", 13, 48, 4, 2, 16, rows=[]),
    _sample("dropout", 43, 56, 4, 2, 16, p=0.25),
    _sample("dropout-memory-rows", 17, 24, 2, 1, 8, p=0.5, rows=[3, 16, 0]),
    _sample("smollm2", 160, 576, 9, 3, 64, rank=128),
    _sample("grad-gqa", 5, 7, 4, 2, 4, rank=3, bias=True, gradcheck=True),
    _sample("grad-norm-rows-dropout", 6, 5, 2, 1, 4, rank=2, norm=True, rows=[1, 4, 5], p=0.3, gradcheck=True),
    _sample("grad-no-lora", 4, 5, 2, 1, 4, rank=0, norm=True, gradcheck=True),
)


def _backward_samples():
    """Return the forward's samples, preceded by gradients of q, k and v."""

    def with_grads(sample):
        def make(dtype, device, generator):
            inputs = sample.make(dtype, device, generator)
            shapes = [t.shape for t in _fake(**inputs)]
            grads = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device) for s in shapes]
            return dict(zip(("dq", "dk", "dv"), grads, strict=True)) | inputs

        return Sample(sample.name, make)

    return tuple(with_grads(s) for s in SAMPLES)


SPEC = declare(
    OpSpec(
        name="lora_qkv_rope",
        schema=f"({_ARGUMENTS}) -> (Tensor q, Tensor k, Tensor v)",
        reference=ref.lora_qkv_rope,
        fake=_fake,
        setup_context=_setup_context,
        backward=_backward,
        samples=SAMPLES,
        differentiable=("x", "lora_a", "lora_b"),
        outputs=("q", "k", "v"),
        dtypes={"reference": (*_CPU_DTYPES, torch.float16), "cpp": _CPU_DTYPES, "triton": GPU_DTYPES},
        gpu=Gpu("icae_fast.ops.lora_qkv_rope.triton_cuda:lora_qkv_rope"),
    )
)
BACKWARD_SPEC = declare(
    OpSpec(
        name="lora_qkv_rope_backward",
        schema=f"(Tensor dq, Tensor dk, Tensor dv, {_ARGUMENTS}) -> (Tensor dx, Tensor dlora_a, Tensor dlora_b)",
        reference=ref.lora_qkv_rope_backward,
        fake=_fake_backward,
        samples=_backward_samples(),
        outputs=("dx", "dlora_a", "dlora_b"),
        dtypes=SPEC.dtypes,
        gpu=Gpu("icae_fast.ops.lora_qkv_rope.triton_cuda_backward:lora_qkv_rope_backward"),
    )
)
