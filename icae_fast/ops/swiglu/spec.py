"""Declaration of `swiglu` and `swiglu_backward`."""

from __future__ import annotations

import torch

from icae_fast.ops._declare import GPU_DTYPES, Gpu, OpSpec, Sample, declare
from icae_fast.ops.swiglu import ref

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _fake(x, weight, bias, keep):
    columns = weight.shape[0]
    return x.new_empty(x.shape[0], columns // 2), x.new_empty((x.shape[0], columns) if keep else 0)


def _fake_backward(dy, x, weight, bias, gate_up):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ops, ctx, dy, _dgate_up):
    return ops.swiglu_backward(dy, *ctx.saved_tensors), None, None, None


def _sample(name, t, d, size, *, bias=False, keep=True, view=False, gradcheck=False):
    """Return a sample with x (T, d) and m = `size`; `view` makes x a strided slice."""

    def make(dtype, device, generator):
        def rand(*shape, std=1.0):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype).to(device)

        return {
            "x": rand(t, d + 8)[:, 3 : d + 3] if view else rand(t, d),
            "weight": rand(2 * size, d, std=2 * d**-0.5),
            "bias": rand(2 * size) if bias else None,
            "keep": keep,
        }

    return Sample(name, make, gradcheck)


SAMPLES = (
    _sample("smollm2", 70, 576, 1536),
    _sample("not-kept", 33, 64, 96, keep=False),
    _sample("bias-tail", 41, 50, 37, bias=True),
    _sample("odd", 29, 33, 40, bias=True),
    _sample("one-token", 1, 32, 48),
    _sample("few-tokens", 13, 64, 80, keep=False),
    _sample("no-token", 0, 32, 48),
    _sample("view", 45, 64, 16, view=True),
    _sample("long-rows", 30, 2048, 20),
    _sample("grad", 4, 5, 3, bias=True, gradcheck=True),
    _sample("grad-not-kept", 3, 4, 6, keep=False, gradcheck=True),
)


def _backward_samples():
    """Return the forward's samples with the gradient of its result and the products it kept."""

    def with_grads(sample):
        def make(dtype, device, generator):
            inputs = sample.make(dtype, device, generator)
            y, gate_up = ref.swiglu(**inputs)
            dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            return {"dy": dy} | {n: inputs[n] for n in ("x", "weight", "bias")} | {"gate_up": gate_up}

        return Sample(sample.name, make)

    return tuple(with_grads(s) for s in SAMPLES)


SPEC = declare(
    OpSpec(
        name="swiglu",
        schema="(Tensor x, Tensor weight, Tensor? bias, bool keep) -> (Tensor y, Tensor gate_up)",
        reference=ref.swiglu,
        fake=_fake,
        setup_context=_setup_context,
        backward=_backward,
        samples=SAMPLES,
        differentiable=("x",),
        outputs=("y", "gate_up"),
        dtypes={"reference": (*_CPU_DTYPES, torch.float16), "cpp": _CPU_DTYPES, "triton": GPU_DTYPES},
        gpu=Gpu("icae_fast.ops.swiglu.triton_cuda:swiglu"),
    )
)
BACKWARD_SPEC = declare(
    OpSpec(
        name="swiglu_backward",
        schema="(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor gate_up) -> Tensor",
        reference=ref.swiglu_backward,
        fake=_fake_backward,
        samples=_backward_samples(),
        outputs=("dx",),
        dtypes=SPEC.dtypes,
        gpu=Gpu("icae_fast.ops.swiglu.triton_cuda:swiglu_backward"),
    )
)
