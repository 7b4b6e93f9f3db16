"""The library that runs attention on CUDA: this package's Triton kernels, `flash-attn`, or torch's copy of it.

Triton runs unless `set_attention_backend` or the environment variable ICAE_FAST_ATTENTION selects another library. A
selected library that cannot run raises, with one exception: a backward in which the log-sum-exp has a gradient, which
the other two do not support, runs in Triton with a warning.

The routes to `flash-attn` and to torch have not run on a GPU: tests check their arguments with stand-ins.
"""

from __future__ import annotations

import importlib
import os
import warnings

import torch
from torch.utils.weak import WeakIdKeyDictionary

from icae_fast.errors import BackendError

VARIABLE = "ICAE_FAST_ATTENTION"
NAMES = ("triton", "flash_attn", "torch")

_chosen: str | None = None
_NO_GRADIENT: WeakIdKeyDictionary = WeakIdKeyDictionary()


def set_attention_backend(name: str | None) -> None:
    """Select the library that runs `varlen_attention` and its gradient on CUDA, for the whole process.

    Args:
        name: "triton", "flash_attn" (the package flash-attn, 2.7 or later) or "torch" (the flash attention under
            `torch.nn.attention.varlen`); None to return to ICAE_FAST_ATTENTION, by default Triton.

    Raises:
        BackendError: there is no such backend, or it cannot be used here; the setting is then unchanged.
    """
    global _chosen
    if name is not None:
        _require(name)
    _chosen = name


def attention_backend() -> str:
    """Return the backend that runs attention on CUDA now.

    Raises:
        BackendError: ICAE_FAST_ATTENTION names no backend, or one that cannot be used here.
    """
    name = _chosen or os.environ.get(VARIABLE) or "triton"
    _require(name)
    return name


def _require(name):
    """Raise if a backend cannot be used."""
    if name not in NAMES:
        raise BackendError(f"there is no attention backend {name!r}; choose one of {', '.join(NAMES)}")
    if name == "flash_attn":
        _flash_attn()
    if name == "torch" and not torch.backends.cuda.is_flash_attention_available():
        raise BackendError(
            f"attention by torch was requested, but torch {torch.__version__} is built without flash attention; "
            "install a CUDA build, or choose 'triton'"
        )


def _flash_attn():
    try:
        return importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        raise BackendError(
            f"attention by flash-attn was requested, but it cannot be imported ({error}); run "
            "`pip install flash-attn`, or choose 'triton'"
        ) from error


def without_gradient(lse: torch.Tensor) -> torch.Tensor:
    """Return zeros for the gradient of a log-sum-exp without one, marked so that the backward recognises them."""
    zeros = torch.zeros_like(lse)
    _NO_GRADIENT[zeros] = True
    return zeros


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, scale, window):
    """Compute `icae_fast.ops.varlen_attention`."""
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, scale, window)
    name = attention_backend()
    if name == "triton":
        from icae_fast.ops.varlen_attention import triton_cuda

        return triton_cuda.varlen_attention(*arguments)
    from icae_fast.ops.varlen_attention import flash

    return flash.forward(flash.FORWARD[name], name, *arguments)


def varlen_attention_backward(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, scale, window
):
    """Compute `varlen_attention_backward` of `icae_fast.ops.varlen_attention.ref`."""
    rows = (cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, scale, window)
    name = attention_backend()
    if name != "triton" and dlse not in _NO_GRADIENT:
        warnings.warn(
            f"{name} takes no gradient of the log-sum-exp; Triton computes this backward of varlen_attention",
            stacklevel=2,
        )
        name = "triton"
    if name == "triton":
        from icae_fast.ops.varlen_attention import triton_cuda_backward

        return triton_cuda_backward.varlen_attention_backward(dout, dlse, q, k, v, out, lse, *rows)
    from icae_fast.ops.varlen_attention import flash

    return flash.backward(flash.BACKWARD[name], name, dout, q, k, v, out, lse, *rows)
