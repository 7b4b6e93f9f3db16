"""Plain-torch reference of `shared_prefix_attention`, the definition that every kernel is compared with."""

from __future__ import annotations

import torch

from icae_fast.ops.varlen_attention import ref as varlen


def shared_prefix_attention(
    q, k, v, cu_seqlens_q, tail_starts, tail_lengths, prefix_keys, prefix_values, prefix_rows, scale, window, *,
    upcast=True,
):  # fmt: skip
    """Compute the op; `icae_fast.ops.shared_prefix_attention` documents the formula and the shapes."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    cu = cu_seqlens_q.tolist()
    for r, (start, n) in enumerate(zip(tail_starts.tolist(), tail_lengths.tolist(), strict=True)):
        read = [s for s in range(len(prefix_keys)) if prefix_rows[2 * s] <= r < prefix_rows[2 * s + 1]]
        keys, values = (
            torch.cat([*(segments[s] for s in read), tail[start : start + n]])
            for segments, tail in ((prefix_keys, k), (prefix_values, v))
        )
        queries = q[cu[r] : cu[r + 1]]
        cu_q, cu_k = (torch.tensor([0, len(t)], dtype=torch.int32) for t in (queries, keys))
        out[cu[r] : cu[r + 1]] = varlen.varlen_attention(
            queries, keys, values, cu_q, cu_k, None, len(queries), len(keys), scale, window, upcast=upcast
        )[0]
    return out
