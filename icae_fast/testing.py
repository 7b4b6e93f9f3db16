"""The error budget of ops: how far a backend may be from fp64, relative to plain torch.

It is in the package because both tests/ and bench/ use it. Tolerances of whole models are in tests/helpers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from icae_fast.ops import OpSpec, Sample, call_backend

SEED = 1234


def make_inputs(sample: Sample, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Return a sample's arguments, the same on every call and every device."""
    return sample.make(dtype, torch.device(device), torch.Generator().manual_seed(SEED))


def as_tuple(results: Any) -> tuple:
    """Return an op's results as a tuple, even if it has a single one."""
    return results if isinstance(results, tuple) else (results,)


def to_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with floating-point tensors in fp64."""
    return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)


def check_op(spec: OpSpec, backend: str, inputs: dict[str, Any]) -> None:
    """Assert that a backend's results are within the error budget and have the dtypes of the op's fake.

    Args:
        spec: the op.
        backend: name of the backend to check.
        inputs: arguments by name.

    Raises:
        AssertionError: see `assert_within_budget`; or a dtype is wrong.
    """
    got = as_tuple(call_backend(spec, backend)(**inputs))
    truth = as_tuple(spec.reference(**to_float64(inputs)))
    plain = as_tuple(spec.reference(**inputs, upcast=False))
    assert [g.dtype for g in got] == [f.dtype for f in as_tuple(spec.fake(**inputs))]
    assert_within_budget(spec, backend, got, truth, plain)


def assert_within_budget(
    spec: OpSpec,
    backend: str,
    got: Sequence[torch.Tensor],
    truth: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
) -> None:
    """Assert that the error against fp64 is at most twice plain torch's in the same dtype, by RMS and by maximum.

    Args:
        spec, backend: named in messages; the spec adds a floor per dtype.
        got: the backend's results.
        truth: the reference's results in fp64.
        plain: the reference's results in the dtype of `got`, without upcasting.

    Raises:
        AssertionError: a shape differs, a value is finite where the truth is not, or an error is over the budget.
    """
    for name, g, t, p in zip(spec.outputs, got, truth, plain, strict=True):
        assert g.shape == t.shape, f"{spec.name}/{backend}: {name} has shape {tuple(g.shape)}, not {tuple(t.shape)}"
        if not t.numel():
            continue
        finite = torch.isfinite(t)
        assert torch.equal(g[~finite].double(), t[~finite]), f"{spec.name}/{backend}: {name} differs where infinite"
        error, allowed, t = (g.double() - t)[finite], (p.double() - t)[finite], t[finite]
        for kind, norm in (("RMS", lambda e: e.pow(2).mean().sqrt()), ("max", lambda e: e.abs().max())):
            if t.numel():
                limit = 2 * norm(allowed) + spec.floor_of(p.dtype) * norm(t)
                assert norm(error) <= limit, (
                    f"{spec.name}/{backend}: {name} {kind} error {norm(error):.3g} is over {limit:.3g}"
                )
