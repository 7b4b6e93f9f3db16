"""The package's ops: each one declared in its folder's `spec.py`, with a reference and compiled kernels.

    op                       computes
    lora_qkv_rope            packed QKV projection, LoRA on q and v, RoPE
    varlen_attention         causal attention over packed rows, GQA, memory-only queries
    rms_norm                 RMS norm with residual add
    swiglu                   packed gate-up projection and SwiGLU
    linear                   a projection with frozen weights
    shared_prefix_attention  attention of rows with a common prefix of keys
    decode_step              a token step of the whole frozen model

Every folder here is imported, which declares its op: a new op needs a folder with `__init__.py`, `ref.py` and
`spec.py`, a C++ kernel registered for the CPU key, and, if it runs on CUDA, a Triton launcher. It needs no line in this
file: its function is imported from its folder, e.g. `from icae_fast.ops.rms_norm import rms_norm`. The ops above are
exported here as well. `backend_of(op, device)` returns the backend that runs.
"""

import importlib
import pkgutil
import warnings

from icae_fast.ops._declare import (
    REGISTRY,
    OpSpec,
    Sample,
    backend_of,
    backends,
    call_backend,
    load_extension,
    required_backend,
)
from icae_fast.ops.decode_step import BoundStep, StepCache, StepWeights, bind_decode_step, decode_step
from icae_fast.ops.fingerprint import fingerprint
from icae_fast.ops.linear import linear
from icae_fast.ops.lora_qkv_rope import lora_qkv_rope
from icae_fast.ops.rms_norm import rms_norm
from icae_fast.ops.shared_prefix_attention import shared_prefix_attention
from icae_fast.ops.swiglu import swiglu
from icae_fast.ops.varlen_attention import attention_backend, set_attention_backend, varlen_attention

__all__ = [
    "EXTENSION_ERROR",
    "REGISTRY",
    "BoundStep",
    "OpSpec",
    "Sample",
    "StepCache",
    "StepWeights",
    "attention_backend",
    "backend_of",
    "backends",
    "bind_decode_step",
    "call_backend",
    "decode_step",
    "fingerprint",
    "linear",
    "lora_qkv_rope",
    "rms_norm",
    "set_attention_backend",
    "shared_prefix_attention",
    "swiglu",
    "varlen_attention",
]

for _folder in pkgutil.iter_modules(__path__):
    if _folder.ispkg:
        importlib.import_module(f"{__name__}.{_folder.name}")

EXTENSION_ERROR = load_extension()
if EXTENSION_ERROR is not None and required_backend() in ("", "cpp"):
    warnings.warn(
        f"icae_fast runs on its slow plain-torch reference: {EXTENSION_ERROR}. "
        "Or set ICAE_FAST_REQUIRE=reference to accept this.",
        RuntimeWarning,
        stacklevel=2,
    )
