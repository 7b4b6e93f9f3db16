"""Arguments that would make a kernel read or write out of bounds are refused before memory is touched.

`make sanitize` runs this file, too: there, an access out of bounds ends the process with a report.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icae_fast.ops import REGISTRY, backends

pytestmark = pytest.mark.skipif("cpp" not in backends(REGISTRY["rms_norm"]), reason="the C++ kernels are not built")

OPS = torch.ops.icae_fast
LARGE = (2**31 - 1, -(2**31), 2**31 - 8, -1)
HUGE = (2**63 - 1, -(2**63), 2**62, 2**32 + 3, 2**32 + 8, *LARGE)
REFUSED = (RuntimeError, IndexError)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def attend_to_prefixes(starts=(0, 4), lengths=(4, 1), cu=(0, 1, 2), prefixes=(), rows=(), window=0, heads=4):
    k = rand(8, 2, 16)
    keys = [rand(n, 2, 16) for n in prefixes]
    return OPS.shared_prefix_attention(
        rand(2, heads, 16), k, k, ints(*cu), ints(*starts), ints(*lengths), keys, keys, list(rows), 0.25, window
    )


def weights():
    return (
        rand(40, 32), [rand(32)] * 3, [rand(64, 32), rand(32, 32), rand(96, 32), rand(32, 48)], [None] * 4, [None],
        rand(40, 32),
    )  # fmt: skip


def decode(tokens=(1, 2), starts=(0, 8), lengths=(3, 1), heads=(4, 2), prefixes=(), rows=(), window=0):
    caches = rand(1, 16, 2, 8), rand(1, 16, 2, 8)
    keys = [rand(1, n, 2, 8) for n in prefixes]
    return OPS.decode_step(
        torch.tensor(tokens), *weights(), torch.ones(2, 4), torch.zeros(2, 4), *caches, ints(*starts), ints(*lengths),
        keys, keys, list(rows), *heads, 0.3, 1e-5, [window],
    )  # fmt: skip


def bound(starts=(0, 8), lengths=(3, 1), tokens=(1, 2), heads=(4, 2), most=None):
    step = torch.classes.icae_fast.BoundStep(
        *weights(), torch.ones(64, 4), torch.zeros(64, 4), rand(1, 16, 2, 8), rand(1, 16, 2, 8), list(starts), [], [],
        [], *heads, 0.3, 1e-5, [0],
    )  # fmt: skip
    if most is not None:
        return step.greedy(torch.tensor(tokens), list(lengths), most, [], 0)
    return step.step(torch.tensor(tokens), list(lengths))


def attend(cu_q=(0, 3, 5), cu_k=(0, 3, 8), used=None, window=0, heads=(4, 2)):
    q, k = rand(5, heads[0], 16), rand(8, heads[1], 16)
    used = None if used is None else ints(*used)
    return OPS.varlen_attention(q, k, k, ints(*cu_q), ints(*cu_k), used, 5, 8, 0.25, window)


def project(rows=None, heads=(2, 1)):
    return OPS.lora_qkv_rope(
        rand(3, 16), rand(32, 16), None, rand(4, 16), rand(24, 2), torch.ones(3, 4), torch.zeros(3, 4), None,
        None if rows is None else torch.tensor(rows), None, *heads, 1.0, 1e-5, 0.0,
    )  # fmt: skip


def test_the_plain_arguments_are_accepted():
    for result in (attend_to_prefixes(), decode(), bound(), bound(most=2), attend(), *project()[:1]):
        assert torch.isfinite(result[0].float() if isinstance(result, tuple) else result.float()).all()


@pytest.mark.parametrize("value", LARGE)
@pytest.mark.parametrize("call", [attend_to_prefixes, decode])
def test_starts_and_lengths_of_tails(call, value):
    for changed in (
        {"starts": (0, value)},
        {"lengths": (3, value)},
        {"starts": (value, value), "lengths": (value, value)},
    ):
        with pytest.raises(REFUSED):
            call(**changed)


@pytest.mark.parametrize("value", HUGE)
def test_a_bound_step_narrows_nothing(value):
    """2^32 + 8 was taken for 8, and start + length wrapped."""
    for changed in ({"starts": (0, value)}, {"lengths": (3, value)}, {"tokens": (1, value)}):
        for most in (None, 3):
            with pytest.raises(REFUSED):
                bound(**changed, most=most)
    with pytest.raises(REFUSED):
        bound(most=-1)
    with pytest.raises(REFUSED):
        bound(lengths=(3, 8), most=5)  # the fourth step would be past the cache


@pytest.mark.parametrize("value", LARGE)
def test_cumulative_lengths(value):
    for changed in (
        {"cu_q": (0, value, 5)}, {"cu_k": (0, value, 8)}, {"cu_q": (0, 3, value)}, {"cu_k": (value, 3, 8)},
        {"used": (3, value)},
    ):  # fmt: skip
        with pytest.raises(REFUSED):
            attend(**changed)
    for cu in ((0, value, 2), (value, 1, 2), (0, 1, value), (0, value), ()):
        with pytest.raises(REFUSED):
            attend_to_prefixes(cu=cu)


@pytest.mark.parametrize("heads", [(0, 1), (1, 0), (-4, 2), (2**62, 2), (2**63 - 1, 1), (2**62, 2**62), (3, 2)])
def test_heads(heads):
    """2 * (q_heads + 2 * kv_heads) was 0 for 2^63 - 2 and 1, and the division ended the process."""
    for call in (decode, bound, project):
        with pytest.raises(REFUSED):
            call(heads=heads)
    with pytest.raises(REFUSED):
        project(heads=(2**63 - 2, 1))


@pytest.mark.parametrize("rows", [(0, 3), (2, 2), (1, 0), (-1, 1), (0, 2**63 - 1), (-(2**63), 1), (0,), (0, 2, 1)])
def test_rows_that_share_a_prefix(rows):
    for call in (attend_to_prefixes, decode):
        with pytest.raises(REFUSED):
            call(prefixes=(3,), rows=rows)


def test_more_positions_than_32_bits():
    keys = rand(1, 2, 16).expand(2**30, 2, 16)
    k = rand(8, 2, 16)
    with pytest.raises(RuntimeError, match="positions that are supported"):
        OPS.shared_prefix_attention(
            rand(2, 4, 16), k, k, ints(0, 1, 2), ints(0, 4), ints(4, 1), [keys] * 3, [keys] * 3, [0, 2] * 3, 0.25, 0
        )


@pytest.mark.parametrize("rows", [[3], [-1], [2**62], [-(2**63)], [0, 1, 2, 3]])
def test_rows_of_queries(rows):
    with pytest.raises(REFUSED):
        project(rows=rows)


@pytest.mark.parametrize("window", [-1, -(2**63)])
def test_windows(window):
    for call in (attend, attend_to_prefixes):
        with pytest.raises(REFUSED):
            call(window=window)
    assert torch.equal(attend(window=2**63 - 1)[0], attend()[0])


def test_products_over_nothing_are_zero():
    """No query row is left where q_rows is empty; on AMX, the product over them asked for 85 GB."""
    for dtype in (torch.float32, torch.bfloat16):
        x, cos, sin = rand(40, 16, dtype=dtype), torch.ones(40, 4), torch.zeros(40, 4)
        tensors = [rand(32, 16, dtype=dtype), rand(4, 16, dtype=dtype), rand(24, 2, dtype=dtype)]
        x, weight, a, b = (t.requires_grad_(t is not tensors[0]) for t in (x, *tensors))
        none = torch.empty(0, dtype=torch.int64)
        q, k, v = OPS.lora_qkv_rope(x, weight, None, a, b, cos, sin, None, none, None, 2, 1, 1.0, 1e-5, 0.0)
        assert q.shape == (0, 2, 8)
        grads = torch.autograd.grad(k.sum() + v.sum(), (x, a, b))
        assert all(torch.isfinite(g).all() for g in grads)
        assert not grads[1][:2].any()
        assert not grads[2][:16].any()


nasty = st.sampled_from([0, 1, 2, 3, 5, 8, *LARGE])


@settings(max_examples=300)
@given(st.lists(nasty, min_size=2, max_size=2), st.lists(nasty, min_size=2, max_size=2), st.lists(nasty, max_size=4))
def test_any_mixture_is_computed_or_refused(starts, lengths, cu):
    for call, arguments in (
        (attend_to_prefixes, {"starts": starts, "lengths": lengths}),
        (attend_to_prefixes, {"cu": cu}),
        (decode, {"starts": starts, "lengths": lengths}),
        (bound, {"starts": starts, "lengths": lengths}),
        (attend, {"cu_q": cu, "cu_k": cu}),
        (attend, {"cu_q": (0, 3, 5), "cu_k": (0, 3, 8), "used": starts}),
    ):
        try:
            call(**arguments)
        except REFUSED:
            continue
