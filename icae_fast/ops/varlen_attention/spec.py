"""Declaration of `varlen_attention` and `varlen_attention_backward`."""

from __future__ import annotations

from itertools import accumulate

import torch

from icae_fast.ops._declare import GPU_DTYPES, Gpu, OpSpec, Sample, declare
from icae_fast.ops.varlen_attention import ref
from icae_fast.ops.varlen_attention.backends import attention_backend, without_gradient

_ROWS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, int max_seqlen_q, int max_seqlen_k, float scale, int window"  # noqa: E501
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = {
    "reference": (*_CPU_DTYPES, torch.float16),
    "cpp": _CPU_DTYPES,
    "triton": GPU_DTYPES,
    "flash_attn": _FLASH_DTYPES,
    "torch": _FLASH_DTYPES,
}
_BACKENDS = "icae_fast.ops.varlen_attention.backends:"


def _fake(q, k, v, *_args, **_kwargs):
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse)


def _fake_backward(dout, dlse, q, k, v, *_args, **_kwargs):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
    ctx.settings = inputs[6:]


def _backward(ops, ctx, dout, dlse):
    q, k, v, out, lse, *rows = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = without_gradient(lse) if dlse is None else dlse
    grads = ops.varlen_attention_backward(dout, dlse, q, k, v, out, lse, *rows, *ctx.settings)
    return (*grads, *[None] * 7)


def _sample(name, rows, hq, hkv, head_dim, *, window=0, used=None, view=False, rising=False, gradcheck=False):
    """Return a sample of `rows` [(query length, key length), ...].

    Args:
        used: number of valid keys of each row, None for all.
        view: make q, k and v strided.
        rising: let keys grow along the rows, so that an online softmax raises its maximum many times.
    """

    def make(dtype, device, generator):
        def rand(length, heads):
            pad = 5 if view else 0
            values = torch.randn(length, heads + pad, head_dim, generator=generator, dtype=torch.float64)
            return values.to(dtype).to(device)[:, pad:]

        def cumulative(lengths):
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

        lq, lk = [r[0] for r in rows], [r[1] for r in rows]
        q, k = rand(sum(lq), hq), rand(sum(lk), hkv)
        if rising:
            k *= torch.linspace(0.1, 6, len(k), dtype=dtype, device=device)[:, None, None]
        return {
            "q": q,
            "k": k,
            "v": rand(sum(lk), hkv),
            "cu_seqlens_q": cumulative(lq),
            "cu_seqlens_k": cumulative(lk),
            "seqused_k": None if used is None else torch.tensor(used, dtype=torch.int32, device=device),
            "max_seqlen_q": max(lq, default=0),
            "max_seqlen_k": max(lk, default=0),
            "scale": head_dim**-0.5,
            "window": window,
        }

    return Sample(name, make, gradcheck)


SAMPLES = (
    _sample("one-token", [(1, 1)], 2, 1, 64),
    _sample("gqa-primes", [(37, 37), (101, 101), (1, 1), (13, 13)], 9, 3, 64),
    _sample("mha-d80", [(67, 67), (2, 2)], 2, 2, 80),
    _sample("d128-tiles", [(64, 64), (129, 129)], 4, 1, 128),
    _sample("d16", [(31, 31)], 4, 2, 16),
    _sample("empty-rows", [(0, 0), (5, 5), (0, 7), (3, 3), (0, 0)], 2, 1, 64),
    _sample("nothing", [], 2, 1, 64),
    _sample("no-keys", [(3, 0), (4, 2)], 2, 2, 16),
    _sample("memory-queries", [(8, 72), (8, 21), (16, 16)], 4, 2, 64),
    _sample("decode", [(1, 300), (1, 1), (1, 65)], 6, 2, 64),
    _sample("seqused", [(1, 40), (3, 40), (2, 40)], 4, 2, 64, used=[17, 40, 2]),
    _sample("window", [(90, 90), (5, 70)], 2, 1, 64, window=33),
    _sample("view", [(23, 23), (40, 40)], 4, 2, 64, view=True),
    _sample("rising", [(200, 200)], 3, 1, 64, rising=True),
    _sample("span-512", [(640, 640)], 3, 1, 64),
    _sample("grad-gqa", [(5, 5), (1, 1), (0, 0), (3, 6)], 4, 2, 4, gradcheck=True),
    _sample("grad-window-view", [(7, 7), (3, 1)], 2, 1, 6, window=3, view=True, gradcheck=True),
)


def _backward_samples():
    """Return the forward's samples with the forward's results and gradients of them."""

    def with_grads(sample):
        def make(dtype, device, generator):
            inputs = sample.make(dtype, device, generator)
            out, lse = ref.varlen_attention(**inputs)
            dout, dlse = (
                torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype).to(device)
                for t in (out, lse)
            )
            tensors = {"dout": dout, "dlse": dlse} | {n: inputs.pop(n) for n in "qkv"} | {"out": out, "lse": lse}
            return tensors | inputs

        return Sample(sample.name, make)

    return tuple(with_grads(s) for s in SAMPLES)


SPEC = declare(
    OpSpec(
        name="varlen_attention",
        schema=f"(Tensor q, Tensor k, Tensor v, {_ROWS}) -> (Tensor out, Tensor lse)",
        reference=ref.varlen_attention,
        fake=_fake,
        setup_context=_setup_context,
        backward=_backward,
        samples=SAMPLES,
        differentiable=("q", "k", "v"),
        outputs=("out", "lse"),
        dtypes=_DTYPES,
        gpu=Gpu(_BACKENDS + "varlen_attention", attention_backend),
    )
)
BACKWARD_SPEC = declare(
    OpSpec(
        name="varlen_attention_backward",
        schema=f"(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ROWS}) "
        "-> (Tensor dq, Tensor dk, Tensor dv)",
        reference=ref.varlen_attention_backward,
        fake=_fake_backward,
        samples=_backward_samples(),
        outputs=("dq", "dk", "dv"),
        dtypes=_DTYPES,
        gpu=Gpu(_BACKENDS + "varlen_attention_backward", attention_backend),
    )
)
