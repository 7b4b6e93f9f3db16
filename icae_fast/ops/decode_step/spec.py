"""Declaration of `decode_step`."""

from __future__ import annotations

from typing import Any

import torch

from icae_fast.ops._declare import GPU_DTYPES, Gpu, OpSpec, Sample, declare
from icae_fast.ops.decode_step import ref
from icae_fast.ops.decode_step.arguments import StepArguments

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _fake(*arguments: Any, **named: Any) -> torch.Tensor:
    a = StepArguments(*arguments, **named)
    wide = torch.float64 if a.embedding.dtype == torch.float64 else torch.float32
    return a.embedding.new_empty((a.tokens.shape[0], a.head.shape[0]), dtype=wide)


def _sample(name, tails, segments, *, heads=(4, 2), head_dim=16, hidden=32, inner=48, layers=2, biases=False,
            qk_norm=False, windows=(0, 0)):  # fmt: skip
    """Return a sample with random weights, `tails` the length of each row's tail and `segments` (length, first row, end
    row) each."""
    hq, hkv = heads
    rows, vocabulary = len(tails), 50

    def make(dtype, device, generator):
        def rand(*shape, std=1.0):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype).to(device)

        def ints(values):
            return torch.tensor(values, dtype=torch.int32, device=device)

        shapes = [((hq + 2 * hkv) * head_dim, hidden), (hidden, hq * head_dim), (2 * inner, hidden), (hidden, inner)]
        shapes *= layers
        angles = torch.rand(rows, head_dim // 2, generator=generator, dtype=torch.float64).to(device) * 6.28
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        caches = [(layers, n, hkv, head_dim) for n in [sum(tails) + 3, *(n for n, _, _ in segments)]]
        keys, values = ([rand(*shape) for shape in caches] for _ in range(2))
        starts = [3 + sum(tails[:r]) for r in range(rows)]
        return {
            "tokens": torch.randint(vocabulary, (rows,), generator=generator).to(device),
            "embedding": rand(vocabulary, hidden),
            "norms": [1 + rand(hidden, std=0.1) for _ in range(2 * layers + 1)],
            "matrices": [rand(*shape, std=shape[1] ** -0.5) for shape in shapes],
            "biases": [rand(n, std=0.3) if biases else None for n, _ in shapes],
            "qk_norms": [1 + rand(2, head_dim, std=0.1) if qk_norm else None for _ in range(layers)],
            "head": rand(vocabulary + 3, hidden),
            "cos": angles.cos().to(wide),
            "sin": angles.sin().to(wide),
            "tail_keys": keys[0],
            "tail_values": values[0],
            "tail_starts": ints(starts),
            "tail_lengths": ints(tails),
            "prefix_keys": keys[1:],
            "prefix_values": values[1:],
            "prefix_rows": [i for _, begin, end in segments for i in (begin, end)],
            "num_q_heads": hq,
            "num_kv_heads": hkv,
            "scale": head_dim**-0.5,
            "norm_eps": 1e-5,
            "windows": list(windows),
        }

    return Sample(name, make)


SAMPLES = (
    _sample("one-row", [5], [(9, 0, 1), (40, 0, 1)]),
    _sample("first-token", [1], []),
    _sample("nine-rows", [3, 1, 7, 2, 9, 4, 1, 6, 70], [(6, 0, 9), (33, 0, 5), (21, 5, 8)]),
    _sample("twenty-rows", list(range(1, 21)), [(150, 0, 20)], heads=(3, 1)),
    _sample("biases-qk-norm", [4, 2, 3], [(5, 0, 2)], biases=True, qk_norm=True),
    _sample("window", [4, 30], [(20, 0, 2), (7, 0, 1)], windows=(9, 0)),
    _sample("many-heads", [3, 8], [(19, 0, 2)], heads=(16, 1), head_dim=8),
    _sample("odd-sizes", [3, 8, 1], [(19, 1, 3)], hidden=37, inner=51, head_dim=6),
    _sample("no-rows", [], []),
)

SPEC = declare(
    OpSpec(
        name="decode_step",
        schema="(Tensor tokens, Tensor embedding, Tensor[] norms, Tensor[] matrices, Tensor?[] biases, "
        "Tensor?[] qk_norms, Tensor head, Tensor cos, Tensor sin, Tensor(a!) tail_keys, Tensor(b!) tail_values, "
        "Tensor tail_starts, Tensor tail_lengths, Tensor[] prefix_keys, Tensor[] prefix_values, int[] prefix_rows, "
        "int num_q_heads, int num_kv_heads, float scale, float norm_eps, int[] windows) -> Tensor",
        reference=ref.decode_step,
        fake=_fake,
        samples=SAMPLES,
        outputs=("logits",),
        dtypes={"reference": (*_CPU_DTYPES, torch.float16), "cpp": _CPU_DTYPES, "triton": GPU_DTYPES},
        gpu=Gpu("icae_fast.ops.decode_step.triton_cuda:decode_step"),
    )
)
