"""The fingerprint of tensors' bytes changes with every kind of change, and only then."""

import importlib

import pytest
import torch

from icae_fast.ops import EXTENSION_ERROR, fingerprint
from icae_fast.ops._declare import interpreted
from icae_fast.ops.fingerprint import ref

SIZES = (1, 7, 64, 1000, 70_001)


# Triton's version runs under its interpreter (`make test-triton`), the others everywhere else.
WAYS = ["triton"] if interpreted() else ["torch"] if EXTENSION_ERROR else ["cpp", "torch"]
FLIPS = 8 if interpreted() else 60  # the interpreter takes 30 ms a flip


@pytest.fixture(params=WAYS)
def digest(request):
    if request.param == "triton":
        return importlib.import_module("icae_fast.ops.fingerprint.triton_cuda").fingerprint
    return fingerprint if request.param == "cpp" else ref.fingerprint


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_one_flipped_bit_anywhere_is_seen(digest, n, dtype):
    t = random(n, dtype=dtype)
    before, seen, raw = digest([t]), set(), t.view(torch.uint8)
    places = torch.randint(len(raw), (FLIPS,), generator=torch.Generator().manual_seed(n)).tolist()
    for place, bit in zip([0, len(raw) - 1, *places], [7, 7, *range(FLIPS)], strict=True):
        raw[place] ^= 1 << bit % 8
        seen.add(digest([t]))
        raw[place] ^= 1 << bit % 8
    assert before not in seen
    assert digest([t]) == before


def test_two_flipped_signs_do_not_cancel(digest):
    t = random(4096)
    before = digest([t])
    for i in range(8):
        for distance in (1, 2, 8, 16, 32, 1024, 2048):
            t[[i, i + distance]] *= -1
            assert digest([t]) != before, (i, distance)
            t[[i, i + distance]] *= -1


def test_order_counts(digest):
    t = random(64, 128)
    before = digest([t])
    for other in (t.flip(0), t.flip(1), t.roll(1, 0), t.roll(1, 1), t[torch.randperm(64)], -t, t * 2, torch.zeros(64)):
        assert digest([other.contiguous()]) != before
    one_hot = [torch.eye(64)[i] for i in range(64)]
    assert len({digest([t]) for t in one_hot}) == 64


def test_constants_have_fingerprints_of_their_own(digest):
    values = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, float("inf"), float("nan")]
    assert len({digest([torch.full((n,), v)]) for v in values for n in (256, 512)}) == 2 * len(values)


def test_it_is_that_of_a_list(digest):
    a, b = random(300), random(300, seed=1)
    assert digest([a, b]) != digest([b, a])
    assert digest([a, b]) != digest([torch.cat((a, b))])
    assert digest([a, a]) != digest([b, b])
    assert digest([a[:100], a[100:]]) != digest([a[:200], a[200:]])


def test_neither_strides_nor_threads_nor_the_address_matter(digest):
    t = random(500, 300)
    expected = digest([t])
    assert digest([t.clone()]) == digest([t.T.contiguous().T]) == expected
    wide = torch.zeros(500, 301)
    wide[:, 1:] = t
    assert digest([wide[:, 1:]]) == expected
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert digest([t]) == expected
    finally:
        torch.set_num_threads(threads)


def test_parameters_are_taken(digest):
    parameter = torch.nn.Parameter(random(10))
    with torch.no_grad():
        assert digest([parameter]) == digest([parameter.data])
    assert isinstance(fingerprint([parameter]), int)
