"""Non-finite values propagate: attention makes the same rows NaN as the reference, and no others."""

import pytest
import torch

from icae_fast.backbone.rows import cumulative
from icae_fast.ops import REGISTRY, backends, call_backend

SPEC = REGISTRY["varlen_attention"]
TOKENS, HEADS, DIM = 200, 3, 64  # several tiles of keys, a partial vector


# Keys at the start, inside and at the end of blocks, and one that few queries read.
@pytest.mark.parametrize("row", [0, 3, 50, 141, 199])
@pytest.mark.parametrize(("where", "value"), [("q", "nan"), ("k", "nan"), ("k", "inf"), ("k", "-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("backend", [b for b in backends(SPEC) if b != "reference"])
def test_attention_keeps_nan(backend, dtype, where, value, row):
    g = torch.Generator().manual_seed(row)
    tensors = {
        name: torch.randn(TOKENS, h, DIM, generator=g).to(dtype) for name, h in (("q", HEADS), ("k", 1), ("v", 1))
    }
    tensors[where][row, 0, 5] = float(value)
    if value != "nan":
        tensors["q"][row:, :, 5] = tensors["q"][row:, :, 5].abs() * (1 if value == "inf" else -1)
    cu = cumulative([TOKENS])
    arguments = (*tensors.values(), cu, cu, None, TOKENS, TOKENS, DIM**-0.5, 0)
    out = call_backend(SPEC, backend)(*arguments)[0]
    expected = SPEC.reference(*arguments)[0]
    assert expected.isnan().any()
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("backend", [b for b in backends(SPEC) if b != "reference"])
def test_what_a_thread_left_behind_changes_no_bit(backend, dtype, one_thread):
    """16 queries of NaN fill a tile of lanes, which 10 queries do not; they were once looked at all the same."""
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(300, HEADS, DIM, generator=g).to(dtype) for _ in range(2))
    few = (torch.randn(10, 3 * HEADS, DIM, generator=g) * 3).to(dtype)
    many = torch.full((16, 3 * HEADS, DIM), torch.nan, dtype=dtype)

    def attend(q):
        return call_backend(SPEC, backend)(
            q, k, v, cumulative([len(q)]), cumulative([300]), None, len(q), 300, 0.125, 0
        )

    expected = attend(few)
    for _ in range(20):
        assert attend(many)[0].isnan().all()
        out = attend(few)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
