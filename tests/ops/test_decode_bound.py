"""`bind_decode_step` computes the same as `decode_step`, and rejects invalid arguments."""

import dataclasses
import sys

import pytest
import torch

from icae_fast.ops import REGISTRY, StepCache, StepWeights, bind_decode_step, decode_step

decode_step_module = sys.modules["icae_fast.ops.decode_step"]  # the package exports the function under this name

SPEC = REGISTRY["decode_step"]


def make(name, dtype):
    sample = next(s for s in SPEC.samples if s.name == name)
    inputs = sample.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(5))
    flat = inputs.pop("prefix_rows")
    return inputs | {"prefix_rows": list(zip(flat[::2], flat[1::2], strict=True))}


def read_lengths(inputs):
    """Return the number of keys that each row reads before its tail."""
    read = [0] * len(inputs["tokens"])
    for keys, (begin, end) in zip(inputs["prefix_keys"], inputs["prefix_rows"], strict=True):
        for r in range(begin, end):
            read[r] += keys.shape[1]
    return read


def weights_of(inputs):
    return StepWeights(**{f.name: inputs[f.name] for f in dataclasses.fields(StepWeights)})


def cache_of(inputs):
    return StepCache(
        inputs["tail_keys"], inputs["tail_values"], inputs["prefix_keys"], inputs["prefix_values"],
        inputs["prefix_rows"],
    )  # fmt: skip


def bind(inputs, cos, sin, **changes):
    given = inputs | changes
    return bind_decode_step(weights_of(given), cos, sin, cache_of(given), given["tail_starts"].tolist())


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
    expected = decode_step(
        inputs["tokens"], weights_of(inputs), cos[positions], sin[positions], cache_of(inputs), inputs["tail_starts"],
        inputs["tail_lengths"],
    )  # fmt: skip
    step = bind(inputs | caches, cos, sin)
    for _ in range(2):  # the second call rewrites the key and value of the first with the same numbers
        torch.testing.assert_close(step.step(inputs["tokens"], lengths), expected, rtol=0, atol=0)
    for n, cache in caches.items():
        torch.testing.assert_close(cache, inputs[n], rtol=0, atol=0)


def test_it_refuses_what_cannot_be_right():
    inputs = make("one-row", torch.float32)
    table = torch.zeros(400, inputs["tail_keys"].shape[3] // 2)
    with pytest.raises(RuntimeError, match="matrices"):
        bind(inputs, table, table, matrices=inputs["matrices"][1:])
    lengths = inputs["tail_lengths"].tolist()
    with pytest.raises(RuntimeError, match="cos has 400 rows, and sin 399"):
        bind(inputs, table, table[1:])
    with pytest.raises(RuntimeError, match=r"cos and sin are \(positions, \d+\) Float, contiguous, not"):
        bind(inputs, table.double(), table.double())
    with pytest.raises(RuntimeError, match="past the rotary tables, which have 5"):
        bind(inputs, table[:5], table[:5]).step(inputs["tokens"], lengths)
    step = bind(inputs, table, table).step
    with pytest.raises(RuntimeError, match="not in the vocabulary"):
        step(inputs["tokens"] + 10**6, lengths)
    with pytest.raises(RuntimeError, match="tail_starts and tail_lengths have 1 and 2 values"):
        step(inputs["tokens"], lengths * 2)
    with pytest.raises(RuntimeError, match="has a tail of 1000 keys"):
        step(inputs["tokens"], [1000])


def test_it_goes_on_with_other_threads():
    """The plan is remade for another number of threads, and each call returns new logits."""
    inputs = make("one-row", torch.float32)
    angles = torch.rand(400, inputs["tail_keys"].shape[3] // 2, generator=torch.Generator().manual_seed(6)) * 6.28
    step, lengths = bind(inputs, angles.cos(), angles.sin()).step, inputs["tail_lengths"].tolist()
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 3, 2):
            torch.set_num_threads(n)
            found.append(step(inputs["tokens"], lengths))
    finally:
        torch.set_num_threads(before)
    assert found[0].isfinite().all()
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=0, atol=0)
    assert len({logits.data_ptr() for logits in found}) == len(found)


def test_it_keeps_the_weights_that_it_was_given():
    inputs = make("one-row", torch.float32)
    inputs["matrices"] = [torch.nn.Parameter(w.clone()) for w in inputs["matrices"]]
    table, lengths = torch.ones(400, inputs["tail_keys"].shape[3] // 2), inputs["tail_lengths"].tolist()
    bound = bind(inputs, table, table * 0)
    before = bound.step(inputs["tokens"], lengths)
    for w in inputs["matrices"]:
        w.data = torch.zeros_like(w)
    torch.testing.assert_close(bound.step(inputs["tokens"], lengths), before, rtol=0, atol=0)
    assert bind(inputs, table, table * 0).step(inputs["tokens"], lengths).ne(before).any()


def with_room(inputs, room):
    """Return the rows with space for `room` more tokens each, and a head that produces base tokens only."""
    starts, lengths = inputs["tail_starts"].tolist(), inputs["tail_lengths"].tolist()
    moved = [start + room * r for r, start in enumerate(starts)]
    caches = {}
    for name in ("tail_keys", "tail_values"):
        layers, n, *rest = inputs[name].shape
        caches[name] = torch.zeros(layers, n + room * len(starts), *rest, dtype=inputs[name].dtype)
        for old, new, length in zip(starts, moved, lengths, strict=True):
            caches[name][:, new : new + length] = inputs[name][:, old : old + length]
    head = inputs["head"][: len(inputs["embedding"])]
    return inputs | caches | {"tail_starts": torch.tensor(moved, dtype=torch.int32), "head": head}


def copied(inputs):
    return inputs | {name: inputs[name].clone() for name in ("tail_keys", "tail_values")}


@pytest.mark.parametrize("in_python", [False, True], ids=["one call", "single steps"])
@pytest.mark.parametrize("name", [s.name for s in SPEC.samples if s.name != "no-rows"])
def test_greedy_steps_are_single_ones(name, in_python, monkeypatch):
    n, inputs = 4, with_room(make(name, torch.float32), 4)
    angles = torch.rand(400, inputs["tail_keys"].shape[3] // 2, generator=torch.Generator().manual_seed(6)) * 6.28
    cos, sin, lengths = angles.cos(), angles.sin(), inputs["tail_lengths"].tolist()
    stepped, tokens, expected = copied(inputs), inputs["tokens"], []
    single = bind(stepped, cos, sin)
    for i in range(n):
        tokens = single.step(tokens, [length + i for length in lengths]).argmax(-1)
        expected.append(tokens.tolist())
    if in_python:
        monkeypatch.setattr(decode_step_module, "backend_of", lambda *_: "reference")
    ahead = copied(inputs)
    assert bind(ahead, cos, sin).greedy(inputs["tokens"], lengths, n, [], 0).tolist() == expected
    for cache in ("tail_keys", "tail_values"):
        torch.testing.assert_close(ahead[cache], stepped[cache], rtol=0, atol=0)
    # The run ends with the first step in which a row chooses an end token.
    end = expected[1][-1]
    last = next(i for i, ids in enumerate(expected) if end in ids)
    ended = bind(copied(inputs), cos, sin).greedy(inputs["tokens"], lengths, n, [10**6, end], 0)
    assert ended.tolist() == expected[: last + 1]
    with pytest.raises(ValueError if in_python else RuntimeError, match="at least one step must be asked for, not 0"):
        bind(inputs, cos, sin).greedy(inputs["tokens"], lengths, 0, [], 0)


@pytest.mark.parametrize("in_python", [False, True], ids=["one call", "single steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("vocabulary", [1, 63, 1000])
def test_the_largest_is_the_one_that_torch_finds(vocabulary, dtype, in_python, monkeypatch):
    """Ties go to the first, and NaN precedes everything."""
    if in_python:
        monkeypatch.setattr(decode_step_module, "backend_of", lambda *_: "reference")
    inputs = with_room(make("biases-qk-norm", dtype), 1)
    g = torch.Generator().manual_seed(0)
    head = torch.randn(vocabulary, inputs["embedding"].shape[1], generator=g).to(dtype)
    head[vocabulary // 2 :: 3] = head[0].clone()
    angles = torch.rand(400, inputs["tail_keys"].shape[3] // 2, generator=g) * 6.28
    cos, sin = (x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in (angles.cos(), angles.sin()))
    lengths = inputs["tail_lengths"].tolist()
    for spoilt in (False, True):
        if spoilt:
            head[vocabulary // 3 :: 5] = torch.nan
        bound = bind(copied(inputs) | {"head": head}, cos, sin)
        expected = bound.step(inputs["tokens"], lengths).max(-1).indices.tolist()
        assert bound.greedy(inputs["tokens"], lengths, 1, [], 0).tolist() == [expected]
        if not spoilt and vocabulary > 1:  # ids that must not be chosen yet, and one past the vocabulary
            allowed = bound.step(inputs["tokens"], lengths)
            allowed[:, expected] = -torch.inf
            least = bound.greedy(inputs["tokens"], lengths, 1, [*expected, 10**6], 1)
            assert least.tolist() == [allowed.max(-1).indices.tolist()]
