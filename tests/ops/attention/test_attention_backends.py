"""Attention backends on CUDA: their selection, the routes to other libraries (by stand-ins), and work lists."""

import inspect
import sys
from itertools import accumulate, pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icae_fast.errors import BackendError
from icae_fast.ops import REGISTRY, _lengths, attention_backend, backend_of, set_attention_backend
from icae_fast.ops._declare import has_triton, interpreted
from icae_fast.ops._lengths import remember
from icae_fast.ops.varlen_attention import backends, flash, ref, work_list
from icae_fast.testing import assert_within_budget, make_inputs, to_float64

SPEC, BACKWARD_SPEC = REGISTRY["varlen_attention"], REGISTRY["varlen_attention_backward"]
FLASH_SAMPLES = [
    pytest.param(s, id=s.name) for s in SPEC.samples if not s.gradcheck and s.name != "nothing"
]  # their heads are multiples of 8


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    yield
    set_attention_backend(None)


# ---- stand-ins: the other libraries' functions with their signatures, computed by the reference ---------------


class Libraries:
    """flash-attn and torch's attention as far as they are called; what they leave unwritten is NaN."""

    def __init__(self):
        self.seen = []

    def _rows(self, q, k, cu_q, cu_k, max_q, max_k, scale, left, seqused_k=None):
        self.seen.append({"max": (max_q, max_k), "scale": scale, "left": left})
        return cu_q, cu_k, seqused_k, max_q, max_k, scale, left + 1 if left >= 0 else 0

    def _attend(self, q, k, v, *rows):
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        rows = self._rows(q, k, *rows)
        out, lse = ref.varlen_attention(q, k, v, *rows)
        lse[lse == -torch.inf] = torch.inf
        for t, cu in ((out, rows[0]), (lse.T, rows[0])):
            t[cu[-1] :] = torch.nan
        return out, lse

    def _gradients(self, dout, q, k, v, out, lse, *rows):
        rows = self._rows(q, k, *rows)
        assert not (lse[:, : rows[0][-1]] == -torch.inf).any()
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        grads = ref.varlen_attention_backward(dout, torch.zeros_like(lse), q, k, v, out, lse, *rows)
        for (a, b), (c, d) in zip(pairwise(rows[0].tolist()), pairwise(rows[1].tolist()), strict=True):
            for grad, span in zip(grads, (slice(a, b), slice(c, d), slice(c, d)), strict=True):
                if a == b or c == d:
                    grad[span] = torch.nan
        for grad, cu in zip(grads, (rows[0], rows[1], rows[1]), strict=True):
            grad[cu[-1] :] = torch.nan
        return grads

    # The signatures are those of flash-attn 2.7 and 2.8 and of torch 2.13.
    def flash_forward(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert causal
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        rows = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size_left, seqused_k)
        return (*self._attend(q, k, v, *rows), None, None)

    def flash_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert causal
        assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
        rows = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size_left)
        for grad, value in zip((dq, dk, dv), self._gradients(dout, q, k, v, out, softmax_lse, *rows), strict=True):
            grad.copy_(value)

    def torch_forward(
        self, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
        scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
    ):  # fmt: skip
        assert is_causal == (window_size_left == -1)
        assert (dropout_p, return_debug_mask, window_size_right) == (0.0, False, 0)
        rows = (cum_seq_q, cum_seq_k, max_q, max_k, scale, window_size_left, seqused_k)
        return (*self._attend(query, key, value, *rows), None, None, None)

    def torch_backward(
        self, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert is_causal == (window_size_left == -1)
        assert (dropout_p, window_size_right) == (0.0, 0)
        rows = (cum_seq_q, cum_seq_k, max_q, max_k, scale, window_size_left)
        return self._gradients(grad_out, query, key, value, out, logsumexp, *rows)


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for both libraries, as if they were installed."""
    stand_in = Libraries()
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = stand_in.flash_forward
    interface._flash_attn_varlen_backward = stand_in.flash_backward
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_in.torch_forward, raising=False)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", stand_in.torch_backward, raising=False)
    return stand_in


@pytest.mark.parametrize("sample", FLASH_SAMPLES)
@pytest.mark.parametrize("name", ["flash_attn", "torch"])
def test_other_libraries_are_given_the_same_problem(libraries, name, sample):
    set_attention_backend(name)
    inputs = make_inputs(sample, torch.bfloat16)
    truth, plain = SPEC.reference(**to_float64(inputs)), SPEC.reference(**inputs, upcast=False)
    out, lse = backends.varlen_attention(**inputs)
    assert_within_budget(SPEC, name, (out, lse), truth, plain)
    assert all(s["scale"] == inputs["scale"] and s["left"] == inputs["window"] - 1 for s in libraries.seen)
    q, k, v, *rows = inputs.values()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    none = backends.without_gradient(lse)
    if inputs["seqused_k"] is not None:
        with pytest.raises(BackendError, match="no gradient of attention with seqused_k"):
            backends.varlen_attention_backward(dout, none, q, k, v, out, lse, *rows)
        return
    grads = backends.varlen_attention_backward(dout, none, q, k, v, out, lse, *rows)
    given_out = {"dout": dout, "dlse": none, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    given_out |= {n: value for n, value in inputs.items() if n not in "qkv"}
    truth = BACKWARD_SPEC.reference(**to_float64(given_out))
    assert_within_budget(BACKWARD_SPEC, name, grads, truth, BACKWARD_SPEC.reference(**given_out, upcast=False))


@pytest.mark.parametrize("name", ["flash_attn", "torch"])
def test_other_libraries_leave_tokens_outside_all_rows_to_us(libraries, name):
    set_attention_backend(name)
    q, k, v = (torch.randn(20, heads, 16).bfloat16() for heads in (4, 2, 2))
    cu = torch.tensor([0, 3, 11], dtype=torch.int32)
    rows = (cu, cu, None, 8, 8, 0.25, 0)
    out, lse = backends.varlen_attention(q, k, v, *rows)
    assert not out[11:].any()
    assert torch.isneginf(lse[:, 11:]).all()
    none = backends.without_gradient(lse)
    for grad in backends.varlen_attention_backward(torch.randn_like(q), none, q, k, v, out, lse, *rows):
        assert not grad[11:].any()
        assert grad[:11].any()


@pytest.mark.parametrize("name", ["flash_attn", "torch"])
def test_no_token_at_all(libraries, name):
    set_attention_backend(name)
    sample = next(s for s in SPEC.samples if s.name == "nothing")
    inputs = make_inputs(sample, torch.bfloat16)
    out, lse = backends.varlen_attention(**inputs)
    assert (out.shape, lse.shape) == ((0, 2, 64), (2, 0))
    q, k, v, *rows = inputs.values()
    grads = backends.varlen_attention_backward(out, backends.without_gradient(lse), q, k, v, out, lse, *rows)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_arguments_fit_the_schemas_of_torch():
    """Check our arguments by torch, which infers the shapes of its ops without a GPU."""
    q, k, v = (torch.empty(20, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    out, lse = flash._torch_forward(q, k, v, cu, cu, None, 8, 8, 0.125, -1)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 20), torch.float32)
    grads = flash._torch_backward(out, q, k, v, out, lse, cu, cu, 8, 8, 0.125, 6)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("name", ["flash_attn", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "takes float16 or bfloat16, not torch.float32"),
        ({"head_dim": 12}, "multiple of 8 up to 256, not 12"),
        ({"head_dim": 264}, "multiple of 8 up to 256, not 264"),
        ({"scale": 0.0}, "scale over 0"),
        ({"scale": -1.0}, "scale over 0"),
    ],
)
def test_other_libraries_refuse_what_they_cannot_do(libraries, name, change, message):
    set_attention_backend(name)
    asked = {"dtype": torch.bfloat16, "head_dim": 16, "scale": 1.0} | change
    q = torch.zeros(4, 2, asked["head_dim"], dtype=asked["dtype"])
    cu = torch.tensor([0, 4], dtype=torch.int32)
    rows = (cu, cu, None, 4, 4, asked["scale"], 0)
    with pytest.raises(BackendError, match=message):
        backends.varlen_attention(q, q, q, *rows)
    lse = torch.zeros(2, 4)
    with pytest.raises(BackendError, match=message):
        backends.varlen_attention_backward(q, backends.without_gradient(lse), q, q, q, q, lse, *rows)
    assert not libraries.seen


@pytest.mark.parametrize("name", ["flash_attn", "torch"])
def test_a_gradient_of_the_log_sum_exp_goes_to_triton_with_a_warning(libraries, name, monkeypatch):
    pytest.importorskip("triton")
    from icae_fast.ops.varlen_attention import triton_cuda_backward

    monkeypatch.setattr(triton_cuda_backward, "varlen_attention_backward", lambda *a: "by Triton")
    set_attention_backend(name)
    inputs = make_inputs(BACKWARD_SPEC.samples[0], torch.bfloat16)
    with pytest.warns(UserWarning, match=f"{name} takes no gradient of the log-sum-exp"):
        assert backends.varlen_attention_backward(**inputs) == "by Triton"


@pytest.mark.parametrize("of_lse", [False, True])
def test_autograd_tells_whether_the_log_sum_exp_has_a_gradient(of_lse):
    """Return the arguments that the op's autograd rule passes to the backward."""
    q = torch.randn(4, 2, 16)
    lse, cu = torch.zeros(2, 4), torch.tensor([0, 4], dtype=torch.int32)
    given_dlse = []
    ops = SimpleNamespace(varlen_attention_backward=lambda dout, dlse, *a: given_dlse.append(dlse) or (q, q, q))
    ctx = SimpleNamespace(saved_tensors=(q, q, q, q, lse, cu, cu, None), settings=(4, 4, 1.0, 0))
    SPEC.backward(ops, ctx, None if of_lse else q, lse if of_lse else None)
    assert (given_dlse[0] in backends._NO_GRADIENT) is not of_lse


# ---- selection -----------------------------------------------------------------------------------------------


def test_triton_is_the_default_and_every_choice_shows(libraries, monkeypatch):
    assert attention_backend() == "triton"
    monkeypatch.setenv(backends.VARIABLE, "flash_attn")
    assert attention_backend() == "flash_attn"
    set_attention_backend("torch")
    assert attention_backend() == "torch"
    if has_triton():
        assert [backend_of(s.name, "cuda") for s in (SPEC, BACKWARD_SPEC)] == ["torch", "torch"]
    set_attention_backend(None)
    assert attention_backend() == "flash_attn"


def test_each_backend_has_its_dtypes():
    for spec in (SPEC, BACKWARD_SPEC):
        assert set(backends.NAMES) <= set(spec.dtypes)


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    for name, message in (
        ("flash_attn", "pip install flash-attn"),
        ("torch", "built without flash attention"),
        ("xformers", "choose one of triton, flash_attn, torch"),
    ):
        with pytest.raises(BackendError, match=message):
            set_attention_backend(name)
        assert attention_backend() == "triton"
        monkeypatch.setenv(backends.VARIABLE, name)
        with pytest.raises(BackendError, match=message):
            attention_backend()
        monkeypatch.delenv(backends.VARIABLE)


def test_launchers_have_the_signature_of_the_op():
    for spec, launcher in ((SPEC, backends.varlen_attention), (BACKWARD_SPEC, backends.varlen_attention_backward)):
        assert list(inspect.signature(launcher).parameters) == spec.argument_names


# ---- work lists ----------------------------------------------------------------------------------------------


def cumulative(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


ROWS = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 90)), max_size=6)


@given(ROWS, st.sampled_from([1, 16, 32]), st.integers(1, 5))
def test_blocks_cover_everything_once_and_none_is_empty(rows, block, pack):
    cu_q, cu_k = (cumulative(lengths) for lengths in ([q for q, _ in rows], [k for _, k in rows]))
    for table, side, heads in (
        (work_list.query_work(cu_q, cu_k, block, pack), 0, pack),
        (work_list.key_work(cu_q, cu_k, block), 1, 1),
    ):
        assert table.dtype == torch.int32
        assert table.shape[1:] == (len(work_list.COLUMNS),)
        covered = []
        for row, first, *begins_and_lengths in table.tolist():
            assert begins_and_lengths == [cu_q[row], rows[row][0], cu_k[row], rows[row][1]]
            members = range(first, min(first + block, rows[row][side] * heads))
            assert members
            covered += [(row, i) for i in members]
        assert sorted(covered) == [(r, i) for r, row in enumerate(rows) for i in range(row[side] * heads)]


def test_the_longest_blocks_come_first():
    cu = cumulative([20, 100])
    queries = work_list.query_work(cu, cu, 32)[:, :2].tolist()
    assert queries == [[1, 96], [1, 64], [1, 32], [0, 0], [1, 0]]
    keys = work_list.key_work(cu, cu, 32)[:, :2].tolist()
    assert keys == [[1, 0], [1, 32], [1, 64], [0, 0], [1, 96]]


def test_lists_are_made_once_for_what_does_not_change():
    cu_q, cu_k = cumulative([5, 3]), cumulative([9, 3])
    first = work_list.query_work(cu_q, cu_k, 16)
    assert work_list.query_work(cu_q, cu_k, 16) is first
    assert work_list.query_work(cu_q, cu_k, 32) is not first
    assert work_list.query_work(cu_q, cu_q, 16) is not first
    cu_q[1:] = torch.tensor([50, 51])
    assert len(work_list.query_work(cu_q, cu_k, 16)) == 5
    tables = _lengths.known(cu_k).tables
    assert len(work_list.query_work(cu_k, cu_q, 16)) == 2
    assert len(tables) == 1
    del cu_q
    assert len(tables) == 0


def test_lists_follow_the_device_of_the_rows():
    cu = remember(torch.empty(3, dtype=torch.int32, device="meta"), [0, 40, 50])
    assert (work_list.key_work(cu, cu, 16).device.type, len(work_list.key_work(cu, cu, 16))) == ("meta", 4)


# ---- the kernels in the interpreter --------------------------------------------------------------------------


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 and ICAE_FAST_REQUIRE=triton")
@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 80)), max_size=2), st.integers(1, 3), st.integers(1, 2),
    st.sampled_from([5, 16, 24]), st.sampled_from([0, 0, 1, 7, 40]), st.sampled_from([0.3, 2.0, -0.5, 0.0]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_triton_at_any_size(rows, group, kv_heads, dim, window, scale, shortened, seed):
    """Use tiles small enough that unmasked ones lie between a window's edges."""
    from icae_fast.ops.varlen_attention import tilings, triton_cuda, triton_cuda_backward

    generator = torch.Generator().manual_seed(seed)
    lq, lk = [q for q, _ in rows], [k for _, k in rows]
    used = torch.tensor([max(0, n - 9) for n in lk], dtype=torch.int32) if shortened else None
    inputs = {n: torch.randn(sum(lens) + 2, heads, dim, generator=generator) for n, lens, heads in
              (("q", lq, group * kv_heads), ("k", lk, kv_heads), ("v", lk, kv_heads))}  # fmt: skip
    inputs |= {"cu_seqlens_q": cumulative(lq), "cu_seqlens_k": cumulative(lk), "seqused_k": used}
    inputs |= {"max_seqlen_q": 99, "max_seqlen_k": 99, "scale": scale, "window": window}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_cuda, "query_block", lambda *a: (16, group if seed % 2 else 1))
        patch.setattr(triton_cuda_backward, "query_block", triton_cuda.query_block)
        patch.setattr(tilings, "key_block", lambda *a: 16)
        for k in (triton_cuda._forward, triton_cuda_backward._dq, triton_cuda_backward._dk_dv):
            patch.setattr(k, "configs", _small_tiles(k.configs))
        out, lse = triton_cuda.varlen_attention(**inputs)
        wide = to_float64(inputs)
        plain = SPEC.reference(**inputs, upcast=False)
        assert_within_budget(SPEC, "triton", (out, lse), SPEC.reference(**wide), plain)
        tensors = {"dout": torch.randn(out.shape, generator=generator), "dlse": torch.randn(lse.shape)}
        tensors |= {n: inputs.pop(n) for n in "qkv"} | {"out": out, "lse": lse}
        grads = triton_cuda_backward.varlen_attention_backward(*tensors.values(), *inputs.values())
        truth = BACKWARD_SPEC.reference(**to_float64(tensors), **inputs)
        plain = BACKWARD_SPEC.reference(**tensors, **inputs, upcast=False)
        assert_within_budget(BACKWARD_SPEC, "triton", grads, truth, plain)


def _small_tiles(configs):
    import triton

    def small(arch, arguments):
        return [triton.Config(dict.fromkeys(configs(arch, arguments)[0].kwargs, 16))]

    return small
