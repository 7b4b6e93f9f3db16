"""What is not finite stays visible: attention turns the same rows to NaN as the reference does."""

import pytest
import torch

from icae_fast.ops import REGISTRY, backends, call_backend
from icae_fast.spans import cumulative

SPEC = REGISTRY["varlen_attention"]
TOKENS, HEADS, DIM = 200, 3, 64  # several tiles of keys, lanes that fill no vector


# Keys at the beginning, inside and at the end of blocks, and one that few queries read.
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
