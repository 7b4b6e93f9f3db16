"""The CUDA route on meta tensors: results match the specs' fakes, and no launcher synchronises with the device."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from icae_fast.ops import REGISTRY
from icae_fast.ops._lengths import remember
from icae_fast.ops._triton import record_launches

CASES = [
    pytest.param(spec, sample, id=f"{spec.name}-{sample.name}")
    for spec in REGISTRY.values()
    if spec.gpu is not None
    for sample in spec.samples
]
HOST_KNOWN = ("cu_seqlens_q", "cu_seqlens_k")  # from `PackedRows`; a meta tensor has no values to read


def to_meta(name, value):
    if isinstance(value, list):
        return [to_meta(name, v) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return remember(meta, value.tolist()) if name in HOST_KNOWN else meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("spec", "sample"), CASES)
def test_results_look_as_the_spec_says(spec, sample, dtype):
    made = sample.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    inputs = {name: to_meta(name, value) for name, value in made.items()}
    module, function = spec.gpu.launcher.split(":")
    with record_launches(90) as launches:
        got = getattr(importlib.import_module(module), function)(*(inputs[n] for n in spec.argument_names))
    expected = spec.fake(*(inputs[n] for n in spec.argument_names))
    got, expected = (t if isinstance(t, tuple) else (t,) for t in (got, expected))
    for name, g, e in zip(spec.outputs, got, expected, strict=True):
        assert (g.shape, g.stride(), g.dtype) == (e.shape, e.stride(), e.dtype), name
    for launch in launches:
        for config in launch.configs():
            assert all(isinstance(n, int) and 0 <= n < 2**31 for n in launch.blocks(config)), launch.kernel.name
