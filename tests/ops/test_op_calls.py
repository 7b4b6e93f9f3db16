"""Ops skip the dispatcher when nothing observes it, and micro-batch sizes depend on the device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from icae_fast import ActivationBudget
from icae_fast.backbone.rows import span_tokens_on, token_budget_on
from icae_fast.ops import REGISTRY, rms_norm
from icae_fast.ops._declare import Op, _listened_to, has_triton


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_nobody_listens_to_plain_arguments():
    x = torch.zeros(2)
    assert not _listened_to((x, torch.nn.Parameter(x), None, 1, 0.5, True))


def test_modes_listen():
    x = torch.zeros(2)
    with Mode():
        assert _listened_to((x,))
    with FakeTensorMode() as fake:
        assert _listened_to((x,))
        assert _listened_to((fake.from_tensor(x),))
    assert not _listened_to((x,))


def test_a_profiler_listens():
    x = torch.zeros(2, 3)
    with torch.profiler.profile() as profile:
        assert _listened_to((x,))
        rms_norm(x, torch.ones(3), 1e-5)
    assert "icae_fast::rms_norm" in {e.key for e in profile.key_averages()}


def test_functorch_tracers_and_subclasses_listen():
    x, seen = torch.zeros(2), []

    def look(t):
        seen.append(_listened_to((t,)))
        return t * 2

    torch.vmap(look)(x[None])
    torch.func.grad(lambda t: look(t).sum())(x)
    make_fx(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    assert seen == [True] * 4
    assert _listened_to((x.as_subclass(Subclass),))


@pytest.mark.parametrize("name", [n for n, spec in REGISTRY.items() if spec.gpu is not None])
def test_what_is_called_on_a_gpu_is_what_the_dispatcher_has(name):
    found = Op(name)._find()
    if not has_triton():
        assert found is getattr(torch.ops.icae_fast, name)
    else:
        assert f"{found.__module__}:{found.__name__}" == REGISTRY[name].gpu.launcher


def test_a_micro_batch_is_larger_on_a_gpu_unless_somebody_says_how_large():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [token_budget_on(d) for d in (cpu, gpu)] == [4096, 32768]
    assert [span_tokens_on(d, ActivationBudget().span_tokens) for d in (cpu, gpu)] == [1024, 8192]
    assert token_budget_on(gpu, 5) == span_tokens_on(gpu, 5) == 5
