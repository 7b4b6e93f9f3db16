"""Declaration of `rms_norm` and `rms_norm_backward`."""

from __future__ import annotations

import torch

from icae_fast.ops._declare import GPU_DTYPES, Gpu, OpSpec, Sample, declare
from icae_fast.ops.rms_norm import ref

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _fake(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _fake_backward(dy, dsum, total, weight, eps):
    return total.new_empty(total.shape)


def _setup_context(ctx, inputs, output):
    x, residual, weight, ctx.eps = inputs
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight)


def _backward(ops, ctx, dy, dsum):
    total, weight = ctx.saved_tensors
    dy = torch.zeros_like(total) if dy is None else dy
    dx = ops.rms_norm_backward(dy, dsum if ctx.has_residual else None, total, weight, ctx.eps)
    return dx, dx if ctx.has_residual else None, None, None


def _sample(name, t, d, *, residual=True, view=False, gradcheck=False):
    """Return a sample of T rows of d; `view` makes x a strided slice."""

    def make(dtype, device, generator):
        def rand(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        return {
            "x": rand(t, d + 3)[:, 3:] if view else rand(t, d),
            "residual": rand(t, d) if residual else None,
            "weight": 1 + rand(d) / 8,
            "eps": 1e-5,
        }

    return Sample(name, make, gradcheck)


SAMPLES = (
    _sample("smollm2", 64, 576),
    _sample("primes", 37, 101),
    _sample("no-residual", 29, 64, residual=False),
    _sample("one-element", 3, 1),
    _sample("no-token", 0, 32),
    _sample("view", 11, 77, view=True),
    _sample("grad", 4, 7, gradcheck=True),
    _sample("grad-no-residual", 3, 18, residual=False, gradcheck=True),
)


def _backward_samples():
    """Return the forward's samples as inputs of its backward."""

    def with_grads(sample):
        def make(dtype, device, generator):
            inputs = sample.make(dtype, device, generator)
            x, residual = inputs["x"], inputs["residual"]
            dy, dsum = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for _ in range(2))
            total = x if residual is None else x + residual
            rest = {"weight": inputs["weight"], "eps": inputs["eps"]}
            return {"dy": dy, "dsum": None if residual is None else dsum, "total": total} | rest

        return Sample(sample.name, make)

    return tuple(with_grads(s) for s in SAMPLES)


SPEC = declare(
    OpSpec(
        name="rms_norm",
        schema="(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor y, Tensor total)",
        reference=ref.rms_norm,
        fake=_fake,
        setup_context=_setup_context,
        backward=_backward,
        samples=SAMPLES,
        differentiable=("x", "residual"),
        outputs=("y", "total"),
        dtypes={"reference": (*_CPU_DTYPES, torch.float16), "cpp": _CPU_DTYPES, "triton": GPU_DTYPES},
        gpu=Gpu("icae_fast.ops.rms_norm.triton_cuda:rms_norm"),
    )
)
BACKWARD_SPEC = declare(
    OpSpec(
        name="rms_norm_backward",
        schema="(Tensor dy, Tensor? dsum, Tensor total, Tensor weight, float eps) -> Tensor",
        reference=ref.rms_norm_backward,
        fake=_fake_backward,
        samples=_backward_samples(),
        outputs=("dx",),
        dtypes=SPEC.dtypes,
        gpu=Gpu("icae_fast.ops.rms_norm.triton_cuda:rms_norm_backward"),
    )
)
