"""Declares ops: one `OpSpec` an op is the only place where its signature, tolerances and samples are written.

The registry is PyTorch's own dispatcher. `declare` defines the op from Python, so that the name exists
with no compiled code at all, and registers the plain-torch reference for every device; the C++ extension
adds kernels for the CPU key and Triton for the CUDA key, and the dispatcher prefers those.

Each backend can also be called by name, which is how the tests compare them: `call_backend(spec,
"reference")` goes through the library `icae_fast_reference`, which never holds anything but the reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import Library, register_autograd, register_fake

from icae_fast.errors import BackendError

NAMESPACE = "icae_fast"
REFERENCE_NAMESPACE = "icae_fast_reference"

GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Dropping a Library object takes its ops with it, so both live as long as the module.
_LIBRARIES = {name: Library(name, "DEF") for name in (NAMESPACE, REFERENCE_NAMESPACE)}

REGISTRY: dict[str, OpSpec] = {}


@dataclass(frozen=True)
class Sample:
    """One set of inputs for an op.

    Args:
        name: a readable test id.
        make: `make(dtype, device, generator) -> kwargs`; floating inputs come in `dtype`.
        gradcheck: small enough for `torch.autograd.gradcheck` in float64.
    """

    name: str
    make: Callable[[torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    gradcheck: bool = False


@dataclass(frozen=True)
class Gpu:
    """What runs an op on CUDA.

    Args:
        launcher: "module:function" with the op's signature; imported when first called.
        backend: its name in `backend_of` and in the spec's `dtypes`, or what gives it where users have a choice.
    """

    launcher: str
    backend: str | Callable[[], str] = "triton"

    @property
    def name(self) -> str:
        """The backend that would run now."""
        return self.backend() if callable(self.backend) else self.backend


@dataclass(frozen=True)
class OpSpec:
    """Everything there is to say about one op.

    Args:
        name: the op's name under `torch.ops.icae_fast`.
        schema: argument and result types in the dispatcher's notation, without the name.
        reference: the op in plain torch. Takes `upcast=True` as a keyword: compute in fp32 when the
            inputs are narrower; with `upcast=False` it is "plain torch in that dtype", the competitor
            that the error budget is measured against.
        fake: shapes, strides and dtypes of the results, computing nothing.
        backward: `backward(ops, ctx, *grads)` and
        setup_context: `setup_context(ctx, inputs, output)`, both None for an op without a gradient;
            `ops` is the namespace (`torch.ops.icae_fast`) whose backward op is to be called.
        samples: inputs that break masks: lengths of 1, primes, nothing, views, GQA.
        differentiable: names of the arguments that get a gradient.
        outputs: names of the results, for messages.
        dtypes: for each backend, the dtypes that it takes.
        floor: for each dtype, the absolute error that is always allowed, relative to the truth's RMS.
        gpu: what runs on CUDA, None for nothing but the reference.
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
        """The error, as a fraction of the truth's RMS, under which no comparison is made."""
        defaults = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
        return (self.floor or defaults)[dtype]


def declare(spec: OpSpec) -> OpSpec:
    """Define the op in both libraries, with its reference, fake and autograd formulas.

    Raises:
        BackendError: an op of that name exists already.
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
                qualified, _bind_namespace(spec.backward, namespace), setup_context=spec.setup_context, lib=library
            )
    if spec.gpu is not None and has_triton():
        for key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
            _LIBRARIES[NAMESPACE].impl(spec.name, imported_when_called(spec.gpu.launcher), key)
    REGISTRY[spec.name] = spec
    return spec


def has_triton() -> bool:
    """Whether Triton is installed and not ruled out by `ICAE_FAST_REQUIRE`."""
    return required_backend() != "reference" and importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether the Triton kernels serve the CPU too, in Triton's interpreter.

    Raises:
        BackendError: they are asked for by `ICAE_FAST_REQUIRE=triton`, and there is neither a GPU nor the interpreter.
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
    """What `ICAE_FAST_REQUIRE` asks for: "" for whatever there is, "cpp", "triton" or "reference".

    Raises:
        BackendError: it asks for something else, or for Triton where it is not installed.
    """
    required = os.environ.get("ICAE_FAST_REQUIRE", "")
    if required not in ("", "cpp", "triton", "reference"):
        raise BackendError(f"ICAE_FAST_REQUIRE is {required!r}; it may be empty, 'cpp', 'triton' or 'reference'")
    if required == "triton" and importlib.util.find_spec("triton") is None:
        raise BackendError("ICAE_FAST_REQUIRE=triton, but Triton is not installed; run `pip install triton`")
    return required


class Op:
    """An op, called past the dispatcher where that would only find the kernel on CUDA.

    The way through the dispatcher, its autograd formula in Python and the kernel in Python costs the host about 20 us,
    which a GPU's layer of a small model does not take. Without a graph nothing on that way matters, unless somebody
    listens there: `torch.compile`, dispatch modes (as those of fake tensors and of counters), functorch, tracers,
    profilers, which name ops, and subclasses of tensors.

    Args:
        name: under `torch.ops.icae_fast`; the first argument must be a tensor.
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

    def _find(self):
        spec = REGISTRY[self.name]
        if spec.gpu is None or not has_triton():
            return getattr(torch.ops.icae_fast, self.name)
        module, function = spec.gpu.launcher.split(":")
        return getattr(importlib.import_module(module), function)


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, int, float, bool, type(None)))


def _listened_to(args: tuple) -> bool:
    """Whether a call of an op does more than run its kernel."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, args))
    )


def imported_when_called(path: str) -> Callable:
    """The function that `path` names. Triton takes most of a second to import, which no CPU user should wait for."""
    module, function = path.split(":")

    def call(*args, **kwargs):
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


def _bind_namespace(backward: Callable, namespace: str) -> Callable:
    def bound(ctx, *grads):
        return backward(getattr(torch.ops, namespace), ctx, *grads)

    return bound


def check_frozen(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise where a tensor that gets no gradient asks for one.

    Raises:
        BackendError: naming it.
    """
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise BackendError(f"{op} gives no gradient to {name}: freeze the base model with requires_grad_(False)")


def backends(spec: OpSpec) -> Iterator[str]:
    """Names of the backends of this op that can run on this machine's CPU, the reference first."""
    yield "reference"
    if backend_of(spec.name, "cpu") != "reference":
        yield backend_of(spec.name, "cpu")


def call_backend(spec: OpSpec, backend: str) -> Callable:
    """The op of one backend as a callable with the full schema (it differentiates like the op itself)."""
    namespace = REFERENCE_NAMESPACE if backend == "reference" else NAMESPACE
    return getattr(getattr(torch.ops, namespace), spec.name).default


def backend_of(op: str, device: str | torch.device = "cpu") -> str:
    """Which backend runs `op` on `device`: `"cpp"`, `"reference"`, or on CUDA `"triton"` and what specs name besides.

    Args:
        op: an op's name, such as `"lora_qkv_rope"`.
        device: a torch device or its type.

    Raises:
        BackendError: there is no such op.
    """
    if op not in REGISTRY:
        raise BackendError(f"there is no op named {op!r}; the ops are {', '.join(sorted(REGISTRY))}")
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(torch.device(device).type)
    if key and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key):
        return "cpp" if key == "CPU" and not interpreted() else REGISTRY[op].gpu.name
    return "reference"


def load_extension() -> str | None:
    """Load the C++ kernels and return None, or the reason why there are none.

    Only a missing or unloadable `icae_fast._C` is tolerated, and its error text is kept for `icae-fast
    info`. `ICAE_FAST_REQUIRE=cpp` does not tolerate it, and `ICAE_FAST_REQUIRE=reference` does not even
    look for it, nor does `ICAE_FAST_REQUIRE=triton` in Triton's interpreter.

    Raises:
        BackendError: the extension is required and cannot be loaded, or the variable holds something else.
    """
    required = required_backend()
    if required == "reference" or interpreted():
        return f"left out by ICAE_FAST_REQUIRE={required}"
    try:
        import icae_fast._C  # noqa: F401

        # glibc learns from the largest block that it gets back how much memory to keep for the next one. Without
        # this it returned each layer's activations to the system: 20 to 50 thousand page faults for 4 x 512 tokens
        # of SmolLM2, 2 % of the time. The block is never touched, and other allocators only see it come and go.
        torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
    except ImportError as error:
        if required == "cpp":
            raise BackendError(
                f"ICAE_FAST_REQUIRE=cpp, but the C++ kernels cannot be loaded ({error}); reinstall with "
                "`pip install --no-build-isolation .` and a C++20 compiler"
            ) from error
        return str(error)
    return None
