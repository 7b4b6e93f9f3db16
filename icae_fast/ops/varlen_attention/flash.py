"""`varlen_attention` by flash-attn and by torch's copy of it; neither route has run on a GPU.

Both are causal and bottom-right aligned like this op. They differ in two cases, which are corrected here: a query
without keys has a log-sum-exp of +inf, and tokens outside of all rows, or in rows without queries or without keys, are
left unwritten.
"""

from __future__ import annotations

import importlib
from itertools import pairwise

import torch

from icae_fast.errors import BackendError
from icae_fast.ops._layout import unit_stride
from icae_fast.ops._lengths import on_host

_INFINITY = float("inf")


def forward(call, name, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_q, max_k, scale, window):
    """Compute the op by `call`, one of `FORWARD`.

    Raises:
        BackendError: the library does not support these inputs.
    """
    _check(name, q, k, v, scale)
    if not len(q) or not len(k):
        return torch.zeros_like(q, memory_format=torch.contiguous_format), _lse(q).fill_(-_INFINITY)
    q, k, v = (unit_stride(t) for t in (q, k, v))
    out, lse = call(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_q, max_k, scale, window - 1 if window else -1)
    unwritten, _ = _unwritten(q, k, cu_seqlens_q, cu_seqlens_k)
    if seqused_k is not None or _has_queries_without_keys(cu_seqlens_q, cu_seqlens_k):
        lse = lse.masked_fill(lse == _INFINITY, -_INFINITY)
    for span in unwritten:
        out[span] = 0
        lse[:, span] = -_INFINITY
    return out, lse


def backward(
    call, name, dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, max_q, max_k, scale, window
):  # fmt: skip
    """Compute the gradients of q, k and v by `call`, one of `BACKWARD`.

    Raises:
        BackendError: the library does not support these inputs.
    """
    _check(name, q, k, v, scale)
    if seqused_k is not None:
        raise BackendError(f"{name} has no gradient of attention with seqused_k; choose 'triton'")
    if not len(q) or not len(k):
        return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    dout, q, k, v, out = (unit_stride(t) for t in (dout, q, k, v, out))
    if _has_queries_without_keys(cu_seqlens_q, cu_seqlens_k):
        lse = lse.masked_fill(lse == -_INFINITY, _INFINITY)
    rows = (cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, window - 1 if window else -1)
    dq, dk, dv = call(dout, q, k, v, out, lse, *rows)
    for grads, spans in zip(((dq,), (dk, dv)), _unwritten(q, k, cu_seqlens_q, cu_seqlens_k), strict=True):
        for grad in grads:
            for span in spans:
                grad[span] = 0
    return dq, dk, dv


def _flash_attn_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_q, max_k, scale, left):
    out, lse, *_ = _interface()._flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, scale, causal=True, window_size_left=left,
        window_size_right=0, softcap=0.0, alibi_slopes=None, return_softmax=False, seqused_k=seqused_k,
    )  # fmt: skip
    return out, lse


def _flash_attn_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, left):
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _interface()._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *grads, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, scale, causal=True,
        window_size_left=left, window_size_right=0, softcap=0.0, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(), rng_state=None,
    )  # fmt: skip
    return grads


def _torch_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_q, max_k, scale, left):
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, left < 0, False, scale=scale, window_size_left=left,
        window_size_right=0, seqused_k=seqused_k,
    )  # fmt: skip
    return out, lse


def _torch_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, left):
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, left < 0, *no_dropout, scale=scale,
        window_size_left=left, window_size_right=0,
    )  # fmt: skip


FORWARD = {"flash_attn": _flash_attn_forward, "torch": _torch_forward}
BACKWARD = {"flash_attn": _flash_attn_backward, "torch": _torch_backward}


def _interface():
    return importlib.import_module("flash_attn.flash_attn_interface")


def _check(name, q, k, v, scale):
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise BackendError(f"attention by {name} takes float16 or bfloat16, not {q.dtype}; choose 'triton'")
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise BackendError(
            f"attention by {name} takes heads whose size is a multiple of 8 up to 256, not {q.shape[2]}; "
            "choose 'triton'"
        )
    if not scale > 0:
        raise BackendError(f"attention by {name} takes a scale over 0, not {scale}; choose 'triton'")


def _lse(q):
    return torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


def _has_queries_without_keys(cu_seqlens_q, cu_seqlens_k):
    rows = zip(pairwise(on_host(cu_seqlens_q)), pairwise(on_host(cu_seqlens_k)), strict=True)
    return any(b - a > d - c for (a, b), (c, d) in rows)


def _unwritten(q, k, cu_seqlens_q, cu_seqlens_k):
    """Return slices of queries in no row or in rows without keys, and of keys in no row or in rows without queries."""
    cu_q, cu_k = on_host(cu_seqlens_q), on_host(cu_seqlens_k)
    of_q, of_k = [slice(cu_q[-1], len(q))], [slice(cu_k[-1], len(k))]
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        (of_q if c == d else of_k if a == b else []).append(slice(a, b) if c == d else slice(c, d))
    return tuple([s for s in spans if s.start < s.stop] for spans in (of_q, of_k))
