"""Op declaration: one `OpSpec` an op holds its signature, tolerances and samples.

Ops are registered with PyTorch's dispatcher. `declare` defines an op from Python, so that it exists without compiled
code, and registers the plain-torch reference for every device. The C++ extension adds kernels for the CPU key and
Triton for the CUDA key, and the dispatcher prefers those.

Tests call backends by name: `call_backend(spec, "reference")` goes through the library `icae_fast_reference`, which
contains only the references.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.library import Library, register_autograd, register_fake

from icae_fast.errors import BackendError
from icae_fast.ops._precision import without_autocast

NAMESPACE = "icae_fast"
REFERENCE_NAMESPACE = "icae_fast_reference"

GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A Library object unregisters its ops when it is freed, so the module keeps both.
_LIBRARIES = {name: Library(name, "DEF") for name in (NAMESPACE, REFERENCE_NAMESPACE)}

REGISTRY: dict[str, OpSpec] = {}


@dataclass(frozen=True)
class Sample:
    """One set of inputs for an op.

    Args:
        name: a readable test id.
        make: `make(dtype, device, generator) -> kwargs`; floating-point inputs have `dtype`.
        gradcheck: small enough for `torch.autograd.gradcheck` in float64.
    """

    name: str
    make: Callable[[torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    gradcheck: bool = False


@dataclass(frozen=True)
class Gpu:
    """The CUDA backend of an op.

    Args:
        launcher: "module:function" with the op's signature; imported at the first call.
        backend: name in `backend_of` and in the spec's `dtypes`, or a function that returns the user's choice.
    """

    launcher: str
    backend: str | Callable[[], str] = "triton"

    @property
    def name(self) -> str:
        """Name of the backend that would run now."""
        return self.backend() if callable(self.backend) else self.backend


@dataclass(frozen=True)
class OpSpec:
    """The declaration of one op.

    Args:
        name: the op's name under `torch.ops.icae_fast`.
        schema: argument and result types in the dispatcher's notation, without the name.
        reference: the op in plain torch. Takes `upcast=True` as a keyword: compute in fp32 when the
            inputs are narrower; with `upcast=False` it computes in their dtype, and its error is the yardstick of the
            error budget.
        fake: returns empty results with the right shapes, strides and dtypes.
        backward: `backward(ops, ctx, *grads)`, None for an op without a gradient; `ops` is the namespace
            (`torch.ops.icae_fast`) whose backward op it calls.
        setup_context: `setup_context(ctx, inputs, output)`, None for an op without a gradient.
        samples: inputs that stress masks and tails: lengths of 1, primes, empty inputs, views, GQA.
        differentiable: names of the arguments that get a gradient.
        outputs: names of the results, for messages.
        dtypes: supported dtypes of each backend.
        floor: error of each dtype that is always allowed, relative to the truth's RMS.
        gpu: CUDA backend, None if only the reference runs on CUDA.
    """

    name: str
    schema: str
    reference: Callable
    fake: Callable
    samples: Iterable[Sample]
    outputs: tuple[str, ...]
    dtypes: dict[str, tuple[torch.dtype, ...]]
    differentiable: tuple[str, ...] = ()
    backward: Callable | None = None
    setup_context: Callable | None = None
    floor: dict[torch.dtype, float] | None = None
    gpu: Gpu | None = None

    @property
    def argument_names(self) -> list[str]:
        """Names of the arguments, in the schema's order."""
        return [a.name for a in torch._C.parse_schema(f"{self.name}{self.schema}").arguments]

    def floor_of(self, dtype: torch.dtype) -> float:
        """Return the error that is always allowed, as a fraction of the truth's RMS."""
        defaults = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
        return (self.floor or defaults)[dtype]


def declare(spec: OpSpec) -> OpSpec:
    """Define the op in both libraries, with its reference, fake and autograd formulas.

    Raises:
        BackendError: an op of that name exists.
    """
    if spec.name in REGISTRY:
        raise BackendError(f"the op {spec.name!r} is declared twice; give the second one another name")
    for namespace, library in _LIBRARIES.items():
        qualified = f"{namespace}::{spec.name}"
        library.define(f"{spec.name}{spec.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(spec.name, spec.reference, "CompositeExplicitAutograd")
        register_fake(qualified, spec.fake, lib=library)
        if spec.backward is not None:
            register_autograd(
                qualified,
                without_autocast(_bind_namespace(spec.backward, namespace)),
                setup_context=spec.setup_context,
                lib=library,
            )
    if spec.gpu is not None and has_triton():
        for key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
            _LIBRARIES[NAMESPACE].impl(spec.name, imported_when_called(spec.gpu.launcher), key)
    REGISTRY[spec.name] = spec
    return spec


def has_triton() -> bool:
    """Return whether Triton is installed and `ICAE_FAST_REQUIRE` does not exclude it."""
    return required_backend() != "reference" and importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether the Triton kernels run on the CPU too, in Triton's interpreter.

    Raises:
        BackendError: `ICAE_FAST_REQUIRE=triton` requires them, and there is neither a GPU nor the interpreter.
    """
    if required_backend() != "triton":
        return False
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return True
    if torch.cuda.is_available():
        return False
    raise BackendError(
        "ICAE_FAST_REQUIRE=triton, but there is no GPU; set TRITON_INTERPRET=1 as well to run the kernels on the CPU, "
        "slowly"
    )


def required_backend() -> str:
    """Return the value of `ICAE_FAST_REQUIRE`: "" for the best available backend, "cpp", "triton" or "reference".

    Raises:
        BackendError: it has another value, or requires Triton, which is not installed.
    """
    required = os.environ.get("ICAE_FAST_REQUIRE", "")
    if required not in ("", "cpp", "triton", "reference"):
        raise BackendError(f"ICAE_FAST_REQUIRE is {required!r}; it may be empty, 'cpp', 'triton' or 'reference'")
    if required == "triton" and importlib.util.find_spec("triton") is None:
        raise BackendError("ICAE_FAST_REQUIRE=triton, but Triton is not installed; run `pip install triton`")
    return required


class Op:
    """An op that is called without the dispatcher on CUDA when no autograd graph is recorded.

    The dispatcher with the autograd formula and the kernel in Python costs the host about 20 us a call, which is longer
    than a GPU takes for a layer of a small model. The dispatcher is still used where something observes or transforms
    calls: `torch.compile`, dispatch modes (e.g. fake tensors and counters), functorch, tracers, profilers and tensor
    subclasses.

    Args:
        name: name under `torch.ops.icae_fast`; the op's first argument must be a tensor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._kernel: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not args[0].is_cuda or torch.is_grad_enabled() or _listened_to(args):
            return getattr(torch.ops.icae_fast, self.name)(*args)
        if self._kernel is None:
            self._kernel = self._find()
        return self._kernel(*args)

    def _find(self) -> Callable:
        spec = REGISTRY[self.name]
        if spec.gpu is None or not has_triton():
            return getattr(torch.ops.icae_fast, self.name)
        module, function = spec.gpu.launcher.split(":")
        return getattr(importlib.import_module(module), function)


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, int, float, bool, type(None)))


def _listened_to(args: tuple) -> bool:
    """Return whether something observes or transforms op calls, so that they must go through the dispatcher."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, args))
    )


def imported_when_called(path: str) -> Callable:
    """Return a function that imports "module:function" when called; importing Triton takes most of a second."""
    module, function = path.split(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


def _bind_namespace(backward: Callable, namespace: str) -> Callable:
    def bound(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return backward(getattr(torch.ops, namespace), ctx, *grads)

    return bound


def check_frozen(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise if a tensor that gets no gradient requires one.

    Raises:
        BackendError: a tensor requires a gradient; the message names it.
    """
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise BackendError(f"{op} computes no gradient of {name}; freeze the base model with requires_grad_(False)")


def backends(spec: OpSpec) -> Iterator[str]:
    """Yield the backends of this op that can run on this machine's CPU, the reference first."""
    yield "reference"
    if backend_of(spec.name, "cpu") != "reference":
        yield backend_of(spec.name, "cpu")


def call_backend(spec: OpSpec, backend: str) -> Callable:
    """Return the op of one backend as a callable with the full schema and the op's gradient."""
    namespace = REFERENCE_NAMESPACE if backend == "reference" else NAMESPACE
    return getattr(getattr(torch.ops, namespace), spec.name).default


def backend_of(op: str, device: str | torch.device = "cpu") -> str:
    """Return the backend that runs `op` on `device`: `"cpp"`, `"reference"`, or on CUDA the spec's `gpu` backend.

    Args:
        op: name of the op, e.g. `"lora_qkv_rope"`.
        device: a torch device or its type.

    Raises:
        BackendError: there is no such op.
    """
    if op not in REGISTRY:
        raise BackendError(f"there is no op named {op!r}; the ops are {', '.join(sorted(REGISTRY))}")
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(torch.device(device).type)
    if key and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key):
        if key == "CPU" and not interpreted():
            return "cpp"
        gpu = REGISTRY[op].gpu
        if gpu is not None:
            return gpu.name
    return "reference"


def load_extension() -> str | None:
    """Load the C++ kernels and return None, or the reason why they are not loaded.

    A missing or unloadable `icae_fast._C` is an error only with `ICAE_FAST_REQUIRE=cpp`; `icae-fast info` shows the
    reason. The extension is skipped with `ICAE_FAST_REQUIRE=reference`, and with `ICAE_FAST_REQUIRE=triton` in Triton's
    interpreter.

    Raises:
        BackendError: the extension is required and cannot be loaded, or the variable has an unknown value.
    """
    required = required_backend()
    if required == "reference" or interpreted():
        return f"left out by ICAE_FAST_REQUIRE={required}"
    reason = _built_for_another_torch()
    if reason is not None:  # loading it could crash
        if required == "cpp":
            raise BackendError(f"ICAE_FAST_REQUIRE=cpp, but {reason}")
        return reason
    try:
        import icae_fast._C  # noqa: F401

        # glibc raises its trim threshold to the largest block freed so far. Without this block it would return each
        # layer's activations to the system: 20 to 50 thousand page faults for 4 x 512 tokens of SmolLM2, 2 % of the
        # time. The block is never touched, and other allocators are not affected.
        torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
    except ImportError as error:
        if required == "cpp":
            raise BackendError(
                f"ICAE_FAST_REQUIRE=cpp, but the C++ kernels cannot be loaded ({error}); reinstall with "
                "`pip install --no-build-isolation .` and a C++20 compiler"
            ) from error
        return f"the C++ kernels are not there ({error}); install with a C++20 compiler"
    return _not_built(required)


def _built_for_another_torch() -> str | None:
    """Return a sentence if the extension's record says that it was built against another torch than the installed one.

    Only versions that differ in their last number have the same binary interface.
    """
    spec = importlib.util.find_spec("icae_fast._C")
    if spec is None or spec.origin is None:
        return None
    try:
        built = str(json.loads(Path(spec.origin).with_name("_C_build.json").read_text())["torch"])
    except (OSError, ValueError, LookupError, TypeError):  # built before there were records
        return None
    if built.split(".")[:2] == torch.__version__.split(".")[:2]:
        return None
    return (
        f"the C++ kernels were built against torch {built} and torch {torch.__version__} is installed; reinstall with "
        "`pip install --no-build-isolation --force-reinstall --no-deps .`"
    )


def _not_built(required: str) -> str | None:
    """Return which ops the extension lacks, so that an old build is not taken for a whole one.

    Raises:
        BackendError: some are missing and `required` is "cpp".
    """
    missing = [name for name, spec in REGISTRY.items() if "cpp" in spec.dtypes and backend_of(name) != "cpp"]
    if not missing:
        return None
    problem = f"the extension was built without {', '.join(missing)}"
    if required == "cpp":
        raise BackendError(f"ICAE_FAST_REQUIRE=cpp, but {problem}; build it again with `pip install -e .`")
    return problem
