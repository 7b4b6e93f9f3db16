"""A launch from the cache equals the launch that Triton would make."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import driver

import icae_fast.ops._relaunch as relaunch
from helpers.triton_stub import Driver, Launcher
from icae_fast.errors import BackendError
from icae_fast.ops import _triton
from icae_fast.ops._triton import INTERPRETED, Kernel
from icae_fast.ops.rms_norm import triton_cuda as rms_norm

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")


def _configs(arch, arguments):
    sizes = (32, 64) if arguments["kind"] == 1 else (64, 32)
    return [triton.Config({"BLOCK": n, "EXTRA": n == 32}, num_warps=1) for n in sizes]


@triton.jit
def _function(x, y, n, kind, other, scale, NAME: tl.constexpr, BLOCK: tl.constexpr, EXTRA: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n).to(tl.float32) * scale
    if other is not None:
        value += other
    if EXTRA:
        value += kind
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < n)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A fake GPU driver that records launches."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_triton, "architecture", lambda device: 90)
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(Launcher, "calls", [])
    return Launcher.calls


@pytest.fixture
def kernel():
    return Kernel(_function, _configs, ("kind",))


def tensor(offset, dtype, n=64):
    """Return a tensor whose address is `offset` elements behind a multiple of 16."""
    whole = torch.zeros(n + 32, dtype=dtype)
    start = -whole.data_ptr() % 64 // whole.element_size()
    return whole[start + offset : start + offset + n]


def launches(kernel, grid, arguments, calls, *, fast, monkeypatch):
    """Return what a launch passes to the driver: compiled source, grid, stream, function, metadata and arguments."""
    monkeypatch.setattr(relaunch, "ENABLED", fast)
    del calls[:]
    kernel(grid, **arguments)
    found = []
    for source, (x, y, z, stream, function, metadata, _, _, _, *values) in calls:
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
        found.append((source.hash(), x, y, z, stream, function, metadata, values))
    return found[-1:]


def grid(arguments):
    return (triton.cdiv(arguments["n"], arguments["BLOCK"]),)


def cases():
    offsets = [0, 1, 8]
    dtypes = [torch.float32, torch.bfloat16]
    for ox, dtype, n, kind in itertools.product(offsets, dtypes, [1, 16, 17, 64], [1, 2]):
        yield {"x": tensor(ox, dtype), "y": tensor(0, dtype), "n": n, "kind": kind, "other": None, "scale": 0.5}
    for other in (1, 16, 5, -1, 2**31, 2**40 + 1, -(2**31), 2**63, 1.5, 1.0, True, None):
        yield {"x": tensor(0, torch.float16), "y": tensor(1, torch.float16), "n": 48, "kind": 1, "other": other}
        yield {"x": tensor(0, torch.float16), "y": tensor(1, torch.float16), "n": 48, "kind": 1, "other": other}


def test_the_same_kernel_grid_stream_and_arguments(gpu, kernel, monkeypatch):
    made = [{"scale": 1.0, "NAME": "a"} | c for c in cases()]
    for arguments in made:  # compiles and caches
        kernel(grid, **arguments)
    known = len(kernel._cases.known)
    for arguments in made + made[::-1]:
        slow = launches(kernel, grid, arguments, gpu, fast=False, monkeypatch=monkeypatch)
        fast = launches(kernel, grid, arguments, gpu, fast=True, monkeypatch=monkeypatch)
        assert len(slow) == 1
        assert slow == fast, arguments
    assert len(kernel._cases.known) == known <= len(made)


def test_a_known_case_does_not_ask_triton(gpu, kernel, monkeypatch):
    arguments = {"x": tensor(0, torch.float32), "y": tensor(0, torch.float32), "n": 64, "kind": 1, "other": None}
    arguments |= {"scale": 1.0, "NAME": "a"}
    kernel(grid, **arguments)
    monkeypatch.setattr(kernel, "_tuner", None)
    kernel(grid, **arguments)
    kernel(grid, **arguments | {"n": 48})  # a multiple of 16 like 64
    kernel((0,), **arguments)  # an empty grid launches nothing
    assert [a[0] for _, a in gpu[-2:]] == [2, 2]
    for change in ({"n": 1}, {"n": 47}, {"kind": 2}, {"other": 3}, {"NAME": "b"}, {"x": tensor(1, torch.float32)}):
        with pytest.raises(TypeError):
            kernel(grid, **arguments | change)


def test_arguments_in_another_order(gpu, kernel, monkeypatch):
    arguments = {"x": tensor(0, torch.float32), "y": tensor(0, torch.float32), "n": 17, "kind": 33, "other": 7}
    arguments |= {"scale": 1.0, "NAME": "a"}
    back = dict(reversed(arguments.items()))
    for a in (arguments, back):
        kernel(grid, **a)
        slow = launches(kernel, grid, a, gpu, fast=False, monkeypatch=monkeypatch)
        assert launches(kernel, grid, a, gpu, fast=True, monkeypatch=monkeypatch) == slow
    assert len(kernel._cases.known) == 2


def test_each_configuration_sets_its_own_constants(gpu, kernel):
    arguments = {"x": tensor(0, torch.float32), "y": tensor(0, torch.float32), "n": 64, "other": None, "scale": 1.0}
    for kind, block in ((1, 32), (2, 64), (1, 32), (2, 64)):
        kernel(grid, **arguments, kind=kind, NAME="a")
        assert gpu[-1][1][0] == 64 // block
        assert gpu[-1][1][-2:] == (block, block == 32)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called(gpu, kernel, monkeypatch, name):
    arguments = {"x": tensor(0, torch.float32), "y": tensor(0, torch.float32), "n": 64, "kind": 1, "other": None}
    arguments |= {"scale": 1.0, "NAME": "a"}
    kernel(grid, **arguments)
    kernel(grid, **arguments)
    assert gpu[-1][1][6:9] == (None, None, None)
    monkeypatch.setattr(triton.knobs.runtime, name, hook := (lambda *a: None))
    kernel(grid, **arguments)
    assert hook in gpu[-1][1][7:9]
    monkeypatch.undo()


def test_hooks_of_the_function_are_called(gpu, kernel, monkeypatch):
    arguments = {"x": tensor(0, torch.float32), "y": tensor(0, torch.float32), "n": 64, "kind": 1, "other": None}
    arguments |= {"scale": 1.0, "NAME": "a"}
    kernel(grid, **arguments)
    calls = []
    monkeypatch.setattr(_function, "pre_run_hooks", [lambda *a, **k: calls.append(1)])
    kernel(grid, **arguments)
    assert calls == [1]


def test_tensors_elsewhere_go_tritons_way(gpu, kernel):
    here = {"x": tensor(0, torch.float32), "n": 64, "kind": 1, "other": None, "scale": 1.0, "NAME": "a"}
    assert kernel._cases.look(here, driver.active.get_current_device()) is not None
    assert kernel._cases.look(here, 0) is None
    assert kernel._cases.look(here | {"n": torch.nn.UninitializedParameter()}, 0) is None


def test_a_choice_by_time_is_refused_while_a_graph_is_captured(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    arguments = {"x": tensor(0, torch.float32), "y": tensor(0, torch.float32), "n": 64, "kind": 1, "other": None}
    with pytest.raises(BackendError, match="before the capture"):
        kernel(grid, **arguments, scale=1.0, NAME="a")
    assert not kernel._cases.known


def test_this_triton_is_known():
    assert relaunch.SUPPORTED


def test_an_op_launches_by_what_is_known(gpu, monkeypatch):
    x, weight = torch.zeros(5, 48, dtype=torch.bfloat16), torch.ones(48, dtype=torch.bfloat16)
    rms_norm.rms_norm(x, x, weight, 1e-5)
    monkeypatch.setattr(rms_norm._forward, "_tuner", None)
    monkeypatch.setattr(Driver, "stream", 9)
    rms_norm.rms_norm(x, x, weight, 1e-5)
    assert gpu[-1][1][:4] == (5, 1, 1, 9)
