"""Slots in int8: bounds of the rounding error, and exact cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icae_fast import errors
from icae_fast.store.quantize import check_slot_dtype, dequantize_rows, pack_slots, quantize_rows, unpack_slots

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 1000), st.floats(-30, 4), DTYPES)
def test_no_value_moves_by_more_than_half_a_step(n, d, seed, exponent, dtype):
    x = (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 10**exponent).to(dtype)
    q, scale = quantize_rows(x)
    assert q.dtype == torch.int8
    assert scale.shape == (n,)
    wide = torch.promote_types(dtype, torch.float32)
    error = (dequantize_rows(q, scale, torch.float64) - x.double()).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()
    assert (scale == x.to(wide).abs().amax(dim=1) / 127).all()


def test_zero_rows_and_extremes_stay():
    x = torch.zeros(3, 4)
    x[1] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    x[2, 0] = 1e-45  # too small for a scale
    q, scale = quantize_rows(x)
    back = dequantize_rows(q, scale, torch.float32)
    assert torch.equal(back[0], x[0])
    assert torch.equal(back[1][[0, 1, 3]], x[1][[0, 1, 3]])
    assert torch.isfinite(back).all()


def test_packing_keeps_what_it_does_not_quantise():
    slots = torch.randn(6, 8)
    assert pack_slots(slots, None)["slots"] is slots
    assert unpack_slots({"slots": slots}, torch.bfloat16) is slots
    assert torch.equal(pack_slots(slots, "bfloat16")["slots"], slots.bfloat16())
    packed = pack_slots(slots.bfloat16(), "int8")
    assert {n: t.dtype for n, t in packed.items()} == {"slots": torch.int8, "slots_scale": torch.float32}
    assert unpack_slots(packed, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int4", torch.int8, ""])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(errors.InvalidInputError, match="'bfloat16', 'int8'"):
        check_slot_dtype(dtype)
