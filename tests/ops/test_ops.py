"""Four generic tests of every op and backend, generated from the specs.

They check results within the error budget, gradients, `opcheck`, and `torch.compile(fullgraph=True)`.
"""

import itertools

import pytest
import torch

from icae_fast.backbone.rows import cumulative
from icae_fast.errors import BackendError
from icae_fast.ops import REGISTRY, backend_of, backends, call_backend, lora_qkv_rope
from icae_fast.ops._declare import interpreted
from icae_fast.testing import as_tuple, check_op, make_inputs, to_float64

CASES = [
    pytest.param(spec, backend, sample, id=f"{spec.name}-{backend}-{sample.name}")
    for spec in REGISTRY.values()
    for backend in backends(spec)
    for sample in spec.samples
]
DIFFERENTIABLE = [case for case in CASES if case.values[0].differentiable]
# The interpreter multiplies the raw bits of bf16, and Triton's fp64 support is incomplete.
DTYPES = [torch.float32, torch.float16] if interpreted() else [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Fill memory from `torch.empty` with NaN, in C++ too, so that unwritten outputs are detected."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("spec", "backend", "sample"), CASES)
def test_results_are_within_the_error_budget(spec, backend, sample, dtype):
    assert dtype in spec.dtypes[backend]
    check_op(spec, backend, make_inputs(sample, dtype))


def differentiable_call(spec, backend, sample, dtype):
    """Return the op as a function of its differentiable tensors, and those tensors."""
    inputs = make_inputs(sample, dtype)
    names = [n for n in spec.differentiable if inputs[n] is not None]
    op = call_backend(spec, backend)

    def call(*tensors):
        # A query without keys has a log-sum-exp of -inf, which finite differences cannot pass.
        outputs = as_tuple(op(**(inputs | dict(zip(names, tensors, strict=True)))))
        return tuple(o.masked_fill(~torch.isfinite(o), 0.0) for o in outputs)

    return call, [inputs[n].detach().clone().requires_grad_() for n in names]


@pytest.mark.parametrize(
    ("spec", "backend", "sample"),
    [c for c in DIFFERENTIABLE if c.values[2].gradcheck and torch.float64 in c.values[0].dtypes[c.values[1]]],
)
def test_gradcheck(spec, backend, sample):
    call, tensors = differentiable_call(spec, backend, sample, torch.float64)
    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize(("spec", "backend", "sample"), DIFFERENTIABLE)
def test_gradients_equal_the_reference(spec, backend, sample):
    """Compare every gradient through autograd, in fp32, with torch's differentiation of the reference."""
    call, tensors = differentiable_call(spec, backend, sample, torch.float32)
    inputs = to_float64(make_inputs(sample, torch.float32))
    names = [n for n in spec.differentiable if inputs[n] is not None]
    truths = [inputs[n].detach().clone().requires_grad_() for n in names]
    outputs = call(*tensors)
    expected = [o.masked_fill(~torch.isfinite(o), 0.0) for o in as_tuple(spec.reference(**(inputs | dict(zip(names, truths, strict=True)))))]  # noqa: E501  # fmt: skip
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) for o in expected]
    # Outputs that a forward keeps for its backward have no gradient.
    weights = [w if o.requires_grad else torch.zeros_like(w) for o, w in zip(outputs, weights, strict=True)]
    got = torch.autograd.grad(sum((o * w.float()).sum() for o, w in zip(outputs, weights, strict=True)), tensors)
    tie = sum(0 * t.sum() for t in truths)  # so that an unread input has a gradient of zero, not None
    truth = torch.autograd.grad(tie + sum((o * w).sum() for o, w in zip(expected, weights, strict=True)), truths)
    for name, g, t in zip(names, got, truth, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=2e-5 * max(1.0, t.abs().max().item() if t.numel() else 0.0), msg=lambda m, n=name: f"{n}: {m}")  # noqa: E501  # fmt: skip


@pytest.mark.parametrize(("spec", "backend", "sample"), CASES)
def test_opcheck(spec, backend, sample):
    inputs = make_inputs(sample, torch.float32)
    for name in spec.differentiable:
        if inputs[name] is not None:
            inputs[name] = inputs[name].detach().clone().requires_grad_()
    # At least four calls of each op, which take too long in the interpreter.
    tests = {"test_utils": ("test_schema", "test_faketensor")} if interpreted() else {}
    torch.library.opcheck(call_backend(spec, backend), (), inputs, **tests)


@pytest.mark.parametrize(
    ("spec", "backend", "sample"),
    [c for c in DIFFERENTIABLE if c.values[2].name in ("gqa", "dropout", "gqa-primes", "primes", "bias-tail")],
)
def test_compiles_without_a_graph_break(spec, backend, sample):
    torch.compiler.reset()  # every case compiles the same closure, and torch limits recompilations
    call, tensors = differentiable_call(spec, backend, sample, torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*tensors), call(*tensors), strict=True):
        torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(sum(o.sum() for o in compiled(*tensors)), tensors)
    expected = torch.autograd.grad(sum(o.sum() for o in call(*tensors)), tensors)
    torch.testing.assert_close(grads, expected)


def test_varlen_attention_equals_a_loop_over_rows():
    """Each row computes the same alone as in the packed batch."""
    spec = REGISTRY["varlen_attention"]
    sample = next(s for s in spec.samples if s.name == "gqa-primes")
    inputs = make_inputs(sample, torch.float32)
    packed = torch.ops.icae_fast.varlen_attention(**inputs)[0]
    cu = inputs["cu_seqlens_q"].tolist()
    for start, end in itertools.pairwise(cu):
        alone = inputs | {n: inputs[n][start:end] for n in "qkv"}
        alone["cu_seqlens_q"] = alone["cu_seqlens_k"] = torch.tensor([0, end - start], dtype=torch.int32)
        torch.testing.assert_close(torch.ops.icae_fast.varlen_attention(**alone)[0], packed[start:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rows_whose_keys_are_packed_one_after_the_other_equal_rows_alone(dtype, one_thread):
    """A row has more keys than the C++ kernel packs at once, between rows whose keys it does not pack."""
    lengths, kv_heads, dim = [1, 2300, 3, 1200, 900, 0, 1, 2500, 2], 2, 64
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), h, dim, generator=g).to(dtype) for h in (2 * kv_heads, kv_heads, kv_heads))

    def attend(q, k, v, lengths):
        cu = cumulative(lengths)
        return torch.ops.icae_fast.varlen_attention(q, k, v, cu, cu, None, max(lengths), max(lengths), 0.125, 0)

    # In Triton's interpreter rows agree except in the last bits.
    exact = {} if interpreted() else {"rtol": 0, "atol": 0}
    out, lse = attend(q, k, v, lengths)
    for start, end in itertools.pairwise(cumulative(lengths).tolist()):
        if end > start:
            alone, alone_lse = attend(q[start:end], k[start:end], v[start:end], [end - start])
            torch.testing.assert_close(out[start:end], alone, **exact)
            torch.testing.assert_close(lse[:, start:end], alone_lse, **exact)


def test_dropout_drops_its_share_and_depends_on_the_seed_alone():
    from icae_fast.ops._dropout import dropout_scale

    seed = torch.tensor(-7 << 33)
    scale = dropout_scale(seed, 0, (500, 400), 0.3, torch.float32, "cpu")
    assert scale.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (scale == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    rows = torch.tensor([3, 499, 0])
    assert torch.equal(dropout_scale(seed, 0, (500, 400), 0.3, torch.float32, "cpu", rows=rows), scale[rows])
    for other in (dropout_scale(seed + 1, 0, (500, 400), 0.3, torch.float32, "cpu"),
                  dropout_scale(seed, 1, (500, 400), 0.3, torch.float32, "cpu")):  # fmt: skip
        assert ((other == 0) != (scale == 0)).float().mean().item() == pytest.approx(0.42, abs=0.01)


def test_frozen_weights_are_asked_for():
    inputs = make_inputs(REGISTRY["lora_qkv_rope"].samples[0], torch.float32)
    inputs["weight"].requires_grad_()
    positional = [inputs.pop(n) for n in ("x", "weight", "bias", "lora_a", "lora_b", "cos", "sin")]
    with pytest.raises(BackendError, match="freeze the base model"):
        lora_qkv_rope(*positional, **inputs)


def test_backend_of_refuses_an_unknown_op():
    with pytest.raises(BackendError, match="varlen_attention"):
        backend_of("flash")
    assert backend_of("varlen_attention", "meta") == "reference"
