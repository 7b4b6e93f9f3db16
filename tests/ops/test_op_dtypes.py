"""Every op runs in the dtypes that its spec declares, and refuses the others in a sentence."""

import pytest
import torch

from icae_fast.ops import REGISTRY, backends, call_backend
from icae_fast.testing import as_tuple, make_inputs

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = [(spec, backend) for spec in REGISTRY.values() for backend in backends(spec)]


def cases(declared):
    """Return parameters (spec, backend, dtype) for the dtypes that are, or are not, declared."""
    return [
        pytest.param(spec, backend, dtype, id=f"{spec.name}-{backend}-{str(dtype).removeprefix('torch.')}")
        for spec, backend in BACKENDS
        for dtype in FLOATS
        if (dtype in spec.dtypes[backend]) == declared
    ]


@pytest.mark.parametrize(("spec", "backend", "dtype"), cases(declared=True))
def test_a_declared_dtype_runs(spec, backend, dtype):
    inputs = make_inputs(spec.samples[0], dtype)
    results = as_tuple(call_backend(spec, backend)(**inputs))
    assert [r.dtype for r in results] == [f.dtype for f in as_tuple(spec.fake(**inputs))]
    assert all(torch.isfinite(r).all() for r in results)


@pytest.mark.parametrize(("spec", "backend", "dtype"), cases(declared=False))
def test_another_dtype_is_refused(spec, backend, dtype):
    names = {"cpp": "the C\\+\\+ kernels take float32, bfloat16 and float64", "triton": "float32, float16"}
    with pytest.raises((NotImplementedError, TypeError), match=names[backend]):
        call_backend(spec, backend)(**make_inputs(spec.samples[0], dtype))
