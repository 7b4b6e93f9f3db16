"""Declaration of `linear`."""

from __future__ import annotations

import torch

from icae_fast.ops._declare import GPU_DTYPES, Gpu, OpSpec, Sample, declare
from icae_fast.ops.linear import ref

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _fake(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward(ops, ctx, dy):
    (weight,) = ctx.saved_tensors
    return ops.linear(dy, weight.t(), None), None, None


def _sample(name, t, d, n, *, bias=False, view=False, transposed=False, gradcheck=False):
    """Return a sample with x (T, d) and W (n, d); `view`: x is a strided slice, `transposed`: W as in a backward."""

    def make(dtype, device, generator):
        def rand(*shape, std=1.0):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype).to(device)

        return {
            "x": rand(t, d + 8)[:, 3 : d + 3] if view else rand(t, d),
            "weight": rand(d, n, std=d**-0.5).t() if transposed else rand(n, d, std=d**-0.5),
            "bias": rand(n) if bias else None,
        }

    return Sample(name, make, gradcheck)


SAMPLES = (
    _sample("smollm2", 70, 1536, 576),
    _sample("bias-tail", 41, 50, 37, bias=True),
    _sample("odd", 29, 33, 40),
    _sample("one-token", 1, 32, 48),
    _sample("one-column", 23, 18, 1, bias=True),
    _sample("few-tokens", 13, 64, 80),
    _sample("no-token", 0, 32, 48),
    _sample("view", 45, 64, 16, view=True),
    _sample("long-rows", 30, 2048, 33),
    _sample("transposed", 53, 576, 200, transposed=True),
    _sample("transposed-odd", 27, 35, 19, bias=True, transposed=True),
    _sample("grad", 4, 5, 3, bias=True, gradcheck=True),
)

SPEC = declare(
    OpSpec(
        name="linear",
        schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        reference=ref.linear,
        fake=_fake,
        setup_context=_setup_context,
        backward=_backward,
        samples=SAMPLES,
        differentiable=("x",),
        outputs=("y",),
        dtypes={"reference": (*_CPU_DTYPES, torch.float16), "cpp": _CPU_DTYPES, "cublas": GPU_DTYPES},
        gpu=Gpu("icae_fast.ops.linear.cublas:linear", backend="cublas"),
    )
)
