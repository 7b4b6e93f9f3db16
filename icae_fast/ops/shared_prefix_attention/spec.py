"""Declaration of `shared_prefix_attention`."""

from __future__ import annotations

from itertools import accumulate

import torch

from icae_fast.ops._declare import GPU_DTYPES, Gpu, OpSpec, Sample, declare
from icae_fast.ops.shared_prefix_attention import ref

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _fake(q, *_args, **_kwargs):
    return q.new_empty(q.shape)


def _sample(name, rows, segments, hq, hkv, head_dim, *, window=0, view=False):
    """Return a sample of `rows` [(queries, tail length), ...] and `segments` [(length, first row, end row), ...].

    Tails have gaps between them and are in reverse order; `view` makes q, k and v strided.
    """

    def make(dtype, device, generator):
        def rand(length, heads):
            pad = 3 if view else 0
            values = torch.randn(length, heads + pad, head_dim, generator=generator, dtype=torch.float64)
            return values.to(dtype).to(device)[:, pad:]

        def ints(values):
            return torch.tensor(values, dtype=torch.int32, device=device)

        lengths = [n for _, n in rows]
        ends = list(accumulate(n + 2 for n in reversed(lengths)))[::-1]
        return {
            "q": rand(sum(n for n, _ in rows), hq),
            "k": rand(sum(lengths) + 2 * len(rows), hkv),
            "v": rand(sum(lengths) + 2 * len(rows), hkv),
            "cu_seqlens_q": ints([0, *accumulate(n for n, _ in rows)]),
            "tail_starts": ints([end - n for end, n in zip(ends, lengths, strict=True)]),
            "tail_lengths": ints(lengths),
            "prefix_keys": [rand(n, hkv) for n, _, _ in segments],
            "prefix_values": [rand(n, hkv) for n, _, _ in segments],
            "prefix_rows": [i for _, begin, end in segments for i in (begin, end)],
            "scale": head_dim**-0.5,
            "window": window,
        }

    return Sample(name, make)


_TREE = [(5, 0, 7), (130, 0, 4), (64, 0, 2), (31, 2, 4), (200, 4, 7)]
SAMPLES = (
    _sample("one-row", [(1, 3)], [(40, 0, 1)], 6, 2, 64),
    _sample("sixteen-rows", [(1, n) for n in range(1, 17)], [(7, 0, 16), (128, 0, 16), (150, 0, 16)], 9, 3, 64),
    _sample("tree", [(1, 2), (1, 9), (1, 1), (1, 70), (1, 5), (1, 6), (1, 7)], _TREE, 4, 2, 64),
    _sample("prefill", [(11, 11), (3, 3), (29, 31), (1, 1)], [(6, 0, 4), (133, 0, 4)], 9, 3, 64),
    _sample("prefill-tree", [(4, 4), (9, 9), (17, 20), (8, 8), (5, 5), (6, 6), (7, 7)], _TREE, 4, 1, 16),
    _sample("no-prefix", [(1, 40), (2, 5)], [], 4, 4, 64),
    _sample("long-tail", [(1, 600), (1, 7)], [(3, 0, 2)], 2, 1, 16),
    _sample("some-without", [(1, 40), (1, 5), (1, 9)], [(33, 1, 2)], 4, 2, 80),
    _sample("empty-segment", [(1, 4), (2, 2)], [(0, 0, 2), (9, 0, 1)], 4, 2, 64),
    _sample("no-queries", [(0, 4), (2, 2)], [(9, 0, 2)], 4, 2, 64),
    _sample("nothing", [], [], 4, 2, 64),
    _sample("window", [(1, 20), (3, 4), (1, 90)], [(30, 0, 3), (40, 0, 2)], 4, 2, 64, window=37),
    _sample("window-tiles", [(20, 20), (40, 44)], [(30, 0, 2), (140, 0, 2)], 4, 2, 64, window=45),
    _sample("view", [(1, 3), (1, 8)], [(40, 0, 2)], 6, 2, 64, view=True),
    _sample("many-heads", [(1, 33), (1, 65)], [(70, 0, 2)], 32, 1, 128),
)

SPEC = declare(
    OpSpec(
        name="shared_prefix_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor tail_starts, Tensor tail_lengths, "
        "Tensor[] prefix_keys, Tensor[] prefix_values, int[] prefix_rows, float scale, int window) -> Tensor",
        reference=ref.shared_prefix_attention,
        fake=_fake,
        samples=SAMPLES,
        outputs=("out",),
        dtypes={"reference": (*_CPU_DTYPES, torch.float16), "cpp": _CPU_DTYPES, "triton": GPU_DTYPES},
        gpu=Gpu("icae_fast.ops.shared_prefix_attention.triton_cuda:shared_prefix_attention"),
    )
)
