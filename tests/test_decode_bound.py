"""`bind_decode_step` gives what `decode_step` gives, and refuses what cannot be right."""

import pytest
import torch

from icae_fast.ops import REGISTRY, bind_decode_step, decode_step

SPEC = REGISTRY["decode_step"]
WEIGHTS = ("embedding", "norms", "matrices", "biases", "qk_norms", "head")
SETTINGS = ("num_q_heads", "num_kv_heads", "scale", "norm_eps", "windows")


def make(name, dtype):
    sample = next(s for s in SPEC.samples if s.name == name)
    inputs = sample.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(5))
    flat = inputs.pop("prefix_rows")
    return inputs | {"prefix_rows": list(zip(flat[::2], flat[1::2], strict=True))}


def read_lengths(inputs):
    """Keys that each row has read before its tail."""
    read = [0] * len(inputs["tokens"])
    for keys, (begin, end) in zip(inputs["prefix_keys"], inputs["prefix_rows"], strict=True):
        for r in range(begin, end):
            read[r] += keys.shape[1]
    return read


def bind(inputs, cos, sin, **changes):
    given = inputs | changes
    return bind_decode_step(
        *(given[n] for n in WEIGHTS), cos, sin, given["tail_keys"], given["tail_values"],
        given["tail_starts"].tolist(), given["prefix_keys"], given["prefix_values"], given["prefix_rows"],
        **{n: given[n] for n in SETTINGS},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [s.name for s in SPEC.samples])
def test_it_equals_the_op(name, dtype):
    inputs = make(name, dtype)
    half = inputs["head"].shape[1] and inputs["tail_keys"].shape[3] // 2
    angles = torch.rand(400, half, generator=torch.Generator().manual_seed(6)) * 6.28
    cos, sin = angles.cos(), angles.sin()
    lengths = inputs["tail_lengths"].tolist()
    positions = torch.tensor([r + n - 1 for r, n in zip(read_lengths(inputs), lengths, strict=True)], dtype=torch.int64)
    caches = {n: inputs[n].clone() for n in ("tail_keys", "tail_values")}
    expected = decode_step(**(inputs | {"cos": cos[positions], "sin": sin[positions]}))
    step = bind(inputs | caches, cos, sin)
    for _ in range(2):  # the second time finds the key and value that the first one wrote, and writes the same
        torch.testing.assert_close(step(inputs["tokens"], lengths), expected, rtol=0, atol=0)
    for n, cache in caches.items():
        torch.testing.assert_close(cache, inputs[n], rtol=0, atol=0)


def test_it_refuses_what_cannot_be_right():
    inputs = make("one-row", torch.float32)
    table = torch.zeros(400, inputs["tail_keys"].shape[3] // 2)
    with pytest.raises(RuntimeError, match="matrices"):
        bind(inputs, table, table, matrices=inputs["matrices"][1:])
    lengths = inputs["tail_lengths"].tolist()
    with pytest.raises(RuntimeError, match="past the rotary tables, which have 5"):
        bind(inputs, table[:5], table[:5])(inputs["tokens"], lengths)
    step = bind(inputs, table, table)
    with pytest.raises(RuntimeError, match="not in the vocabulary"):
        step(inputs["tokens"] + 10**6, lengths)
    with pytest.raises(RuntimeError, match="tail_starts and tail_lengths have 1 and 2 values"):
        step(inputs["tokens"], lengths * 2)
    with pytest.raises(RuntimeError, match="has a tail of 1000 keys"):
        step(inputs["tokens"], [1000])
