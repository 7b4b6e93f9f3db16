"""Plain-torch reference of `varlen_attention` and its gradient, the definition that every kernel is compared with."""

from __future__ import annotations

import itertools

import torch

from icae_fast.ops._precision import compute_dtype


def _rows(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k):
    """Yield the slices of q and of k of each row."""
    cq, ck = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    used = [end - start for start, end in itertools.pairwise(ck)] if seqused_k is None else seqused_k.tolist()
    for i, n in enumerate(used):
        yield slice(cq[i], cq[i + 1]), slice(ck[i], ck[i] + n)


def _mask(lq, lk, window, device):
    """Return a mask, true where query i at position i + lk - lq may attend to key j."""
    pos = torch.arange(lq, device=device)[:, None] + (lk - lq)
    key = torch.arange(lk, device=device)
    return (key <= pos) & (key > pos - window) if window else key <= pos


def _heads(t, n, dtype):
    """Return (L, H, D) as (n, L, D), with each key/value head repeated for the query heads that share it."""
    return t.to(dtype).transpose(0, 1).repeat_interleave(n // t.shape[1], dim=0)


def _lse_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def varlen_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, scale, window, *, upcast=True
):
    """Compute `varlen_attention`; `icae_fast.ops.varlen_attention` documents the formula and the shapes."""
    dtype, heads = compute_dtype(q, upcast), q.shape[1]
    out = q.new_zeros(q.shape)
    lse = q.new_full((heads, q.shape[0]), float("-inf"), dtype=_lse_dtype(q))
    for rq, rk in _rows(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k):
        qi, ki, vi = (_heads(t, heads, dtype) for t in (q[rq], k[rk], v[rk]))
        mask = _mask(qi.shape[1], ki.shape[1], window, q.device)
        scores = (scale * qi @ ki.transpose(1, 2)).masked_fill(~mask, float("-inf"))
        if scores.shape[-1]:
            lse[:, rq] = scores.logsumexp(-1).to(lse.dtype)
            out[rq] = (scores.softmax(-1).masked_fill(~mask.any(-1)[:, None], 0.0) @ vi).transpose(0, 1).to(out.dtype)
    return out, lse


def varlen_attention_backward(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k,
    max_seqlen_q, max_seqlen_k, scale, window, *, upcast=True,
):  # fmt: skip
    """Return the gradients of q, k and v, through the output and through the log-sum-exp."""
    dtype, heads, kv_heads = compute_dtype(q, upcast), q.shape[1], k.shape[1]
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for rq, rk in _rows(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k):
        qi, ki, vi = (_heads(t, heads, dtype) for t in (q[rq], k[rk], v[rk]))
        oi, doi = (_heads(t, heads, dtype) for t in (out[rq], dout[rq]))
        mask = _mask(qi.shape[1], ki.shape[1], window, q.device)
        lse_i = lse[:, rq, None].to(dtype).masked_fill(~mask.any(-1)[:, None], 0.0)
        p = (scale * qi @ ki.transpose(1, 2) - lse_i).exp().masked_fill(~mask, 0.0)
        delta = (oi * doi).sum(-1, keepdim=True) - dlse[:, rq, None].to(dtype)
        ds = scale * p * (doi @ vi.transpose(1, 2) - delta)
        dki, dvi = ds.transpose(1, 2) @ qi, p.transpose(1, 2) @ doi
        dq[rq] = (ds @ ki).transpose(0, 1).to(dq.dtype)
        for grad, g in ((dk, dki), (dv, dvi)):
            grad[rk] = g.unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1).to(grad.dtype)
    return dq, dk, dv
