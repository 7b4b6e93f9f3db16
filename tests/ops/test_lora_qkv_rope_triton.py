"""Cases of the Triton kernels of `lora_qkv_rope` beyond the specs' samples: masks bit by bit, several parts."""

import pytest
import torch

from icae_fast.ops import REGISTRY
from icae_fast.ops._declare import interpreted
from icae_fast.ops._dropout import dropout_scale

if not interpreted():
    pytest.skip("these run in Triton's interpreter, under ICAE_FAST_REQUIRE=triton", allow_module_level=True)

import triton
import triton.language as tl

from icae_fast.ops.lora_qkv_rope.triton_cuda_dropout import kept, row_keys


@triton.jit
def write_masks(seed, rows, out, which, threshold, N: tl.constexpr, D: tl.constexpr):  # noqa: N803
    chosen = tl.load(rows + tl.arange(0, N))[:, None]
    columns = tl.arange(0, D)[None, :]
    mask = kept(row_keys(seed, which, chosen), columns, threshold)
    tl.store(out + tl.arange(0, N)[:, None] * D + columns, mask.to(tl.int32))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.93])
@pytest.mark.parametrize("seed", [0, -1, -(7 << 33) + 5, 0x1234_5678_9ABC_DEF0, 2**63 - 1])
def test_masks_are_those_of_the_reference(seed, p):
    seed, rows = torch.tensor(seed), torch.tensor([0, 1, 2**20 + 3, 2**31 - 1])
    for which in (0, 1):
        expected = dropout_scale(seed, which, (2**31, 128), p, torch.float32, "cpu", rows=rows) != 0
        got = torch.empty(expected.shape, dtype=torch.int32)
        write_masks[(1,)](seed, rows, got, which, int(p * 2**32), N=len(rows), D=128)
        assert torch.equal(got != 0, expected)


def sample_inputs(t, d, hq, hkv, head_dim, rank, rows, p):
    g = torch.Generator().manual_seed(5)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    out = (hq + 2 * hkv) * head_dim
    angle = torch.rand(t, head_dim // 2, generator=g) * 6.28
    n_queries = t if rows is None else len(rows)
    return {
        # Every tensor that may be strided is.
        "dq": rand(n_queries, head_dim, hq).transpose(1, 2), "dk": rand(1, hkv, head_dim).expand(t, -1, -1),
        "dv": rand(hkv, t, head_dim).transpose(0, 1), "x": rand(t, 2 * d)[:, ::2],
        "weight": rand(out, d + 3)[:, 2 : d + 2] * d**-0.5, "bias": rand(out, 2)[:, 0],
        "lora_a": rand(d, 2 * rank).T * d**-0.5, "lora_b": rand((hq + hkv) * head_dim, rank + 1)[:, 1:],
        "cos": angle.cos(), "sin": angle.sin(), "qk_norm": 1 + rand(2, head_dim) / 8,
        "q_rows": None if rows is None else torch.tensor(rows), "dropout_seed": torch.tensor(99) if p else None,
        "num_q_heads": hq, "num_kv_heads": hkv, "lora_scale": 0.5, "norm_eps": 1e-6, "dropout_p": p,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("t", "rows", "p", "rank"),
    [(1100, None, 0.3, 5), (1100, [*range(700, 770), 3], 0.3, 70), (130, [129], 0.0, 5), (130, None, 0.0, 70)],
    ids=["two-parts", "few-tiles-have-queries", "one-query", "two-blocks-of-ranks"],
)
def test_tiles_parts_and_strides(t, rows, p, rank):
    inputs = sample_inputs(t, 40, 2, 1, 24, rank, rows, p)
    for name in ("lora_qkv_rope", "lora_qkv_rope_backward"):
        spec = REGISTRY[name]
        arguments = {n: inputs[n] for n in spec.argument_names}
        wide = {
            n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in arguments.items()
        }
        got = getattr(torch.ops.icae_fast, name)(**arguments)
        for label, g, truth in zip(spec.outputs, got, spec.reference(**wide), strict=True):
            assert g.is_contiguous()
            torch.testing.assert_close(g.double(), truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item(), msg=label)
