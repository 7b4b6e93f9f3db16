"""The C++ ops return the same results every time, from several Python threads, and for any number of threads."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers.build import call, make_inputs
from icae_fast.backbone.rows import cumulative
from icae_fast.ops import EXTENSION_ERROR

if EXTENSION_ERROR is not None:
    pytest.skip(f"there are no C++ kernels: {EXTENSION_ERROR}", allow_module_level=True)

from icae_fast import _C

THREADED = [
    ("varlen_attention", "gqa-primes"),
    ("varlen_attention_backward", "span-512"),
    ("lora_qkv_rope", "smollm2"),
    ("lora_qkv_rope_backward", "smollm2"),
    ("swiglu", "smollm2"),
    ("swiglu_backward", "smollm2"),
    ("linear", "smollm2"),
    ("rms_norm", "smollm2"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "sample"), THREADED)
def test_results_are_the_same_every_time(op, sample, dtype):
    inputs = make_inputs(op, sample, dtype)
    first = call(op, inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(op, inputs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "sample"), THREADED)
def test_several_python_threads_at_once(op, sample, dtype):
    inputs = make_inputs(op, sample, dtype)
    expected = call(op, inputs)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: call(op, inputs), range(16)):
            for a, b in zip(got, expected, strict=True):  # another number of threads may sum in another order
                torch.testing.assert_close(a, b)


# bf16 products run on this package's GEMM where there is one, else on ATen's, which may split sums by thread count.
OWN = [("varlen_attention", "gqa-primes"), ("rms_norm", "smollm2")]
if _C.isa() in ("avx512_fp16", "avx512"):
    OWN += [("lora_qkv_rope", "smollm2"), ("swiglu", "smollm2"), ("linear", "smollm2")]


@pytest.mark.parametrize(("op", "sample"), OWN)
def test_results_do_not_depend_on_the_number_of_threads(op, sample):
    inputs = make_inputs(op, sample, torch.bfloat16)
    expected, threads = call(op, inputs), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        got = call(op, inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_tasks_and_rows_that_are_split_equal_rows_alone(dtype, threads, one_thread):
    """A head of a short row is one task, except in the shortest rows; long rows and rows of few queries are split."""
    lengths = [300, 2, 2300, 41, 0, 513, 129, 1, 40, 700]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 64, generator=g).to(dtype) for heads in (6, 2, 2))

    def attend(q, k, v, lengths):
        cu = cumulative(lengths)
        return torch.ops.icae_fast.varlen_attention(q, k, v, cu, cu, None, max(lengths), max(lengths), 0.125, 0)

    torch.set_num_threads(threads)
    out, lse = attend(q, k, v, lengths)
    for start, end in itertools.pairwise(cumulative(lengths).tolist()):
        if end > start:
            alone, alone_lse = attend(q[start:end], k[start:end], v[start:end], [end - start])
            assert torch.equal(out[start:end], alone)
            assert torch.equal(lse[:, start:end], alone_lse)
