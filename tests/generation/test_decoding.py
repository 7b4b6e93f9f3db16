"""Joint decoding of rows that share segments, compared with the Hugging Face model on each row by itself."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from icae_fast.generation import decoding
from icae_fast.generation.decoding import DecodeSession
from icae_fast.generation.graphs import StepGraph
from icae_fast.generation.step_weights import step_weights
from icae_fast.kv.segments import DecoderRows, KVSegment, SharedSegments, tree_order
from icae_fast.ops import backend_of


@dataclass(frozen=True, eq=False)
class Piece(KVSegment):
    """A segment that also holds the embeddings it was computed from."""

    embeddings: torch.Tensor


def make_piece(icae, path, n, seed):
    """Compute the keys and values of n random tokens that follow the pieces of `path`."""
    x = icae.embed(torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(seed)))
    rows = DecoderRows(icae.backbone, [path], [n], icae.dtype, icae.device)
    icae.backbone.forward(x, rows.append([n]), cache=rows)
    return Piece(*rows.tail(0), sum(s.length for s in path), x)


def expected_logits(icae, path, suffix, tokens):
    """Return the Hugging Face model's next-token logits behind path, suffix and tokens, computed without a cache."""
    x = torch.cat([*(p.embeddings for p in path), suffix, icae.embed(torch.tensor(tokens, dtype=torch.int64))])
    return icae.base_model(inputs_embeds=x[None], use_cache=False).logits[0, -1]


@pytest.fixture
def icae(make_icae, request):
    """A tiny model of the kind the test is parametrized with, llama by default."""
    return make_icae(request.node.callspec.params["model_kind"] if hasattr(request.node, "callspec") else "llama")


@pytest.fixture
def tree(icae):
    """Paths of five rows: rows 0, 2 and 4 share two pieces, row 1 shares the first of these, and row 3 is empty."""
    template = make_piece(icae, [], 5, 1)
    a = make_piece(icae, [template], 11, 2)
    b = make_piece(icae, [template], 7, 3)
    c = make_piece(icae, [template, a], 6, 4)
    return [[template, a], [template, b], [template, a, c], [], [template, a]]


def suffixes_of(icae, lengths):
    g = torch.Generator().manual_seed(9)
    return [icae.embed(torch.randint(3, 90, (n,), generator=g)) for n in lengths]


@torch.no_grad()
def check_session(icae, paths, steps=4):
    suffixes = suffixes_of(icae, [3, 1, 6, 2, 4])
    session = DecodeSession(icae, paths, suffixes, steps)
    rows, read = list(range(5)), [[] for _ in range(5)]
    logits = session.start()
    for step in range(steps):
        for place, row in enumerate(rows):
            expected = expected_logits(icae, paths[row], suffixes[row], read[row])
            torch.testing.assert_close(logits[place].float(), expected.float(), rtol=1e-4, atol=1e-4)
        if step == 2:  # two rows leave: row 3, and row 0, which shares its pieces with rows that stay
            session.keep([1, 2, 4])
            rows, logits = [rows[i] for i in (1, 2, 4)], logits[[1, 2, 4]]
        tokens = logits.argmax(-1)
        for place, row in enumerate(rows):
            read[row].append(int(tokens[place]))
        if step + 1 < steps:
            logits = session.step(tokens)


def test_decoding_steps_equal_a_full_forward(icae, tree, model_kind):
    assert (step_weights(icae.backbone) is None) == (model_kind in ("llama-gelu", "smollm3"))
    check_session(icae, tree)


def test_a_model_with_hooks_runs_module_by_module(icae, tree):
    seen = []
    icae.base_model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    check_session(icae, tree)
    assert len(seen) >= 4


def test_shared_segments_are_found_in_depth_first_order(tree):
    order = tree_order(tree)
    assert sorted(order) == [0, 1, 2, 3, 4]
    shared = SharedSegments.of([tree[r] for r in order])
    assert len(shared.segments) == len({id(s) for path in tree for s in path})  # each segment once
    for row, place in enumerate(order):
        read = [s for s, (begin, end) in zip(shared.segments, shared.rows, strict=True) if begin <= row < end]
        assert [id(s) for s in read] == [id(s) for s in tree[place]]


def test_a_step_runs_with_the_default_number_of_threads():
    """In a process that never sets torch's threads, OpenMP workers first query the thread count inside a step."""
    script = """
import torch
from icae_fast.ops.decode_step.spec import _sample
sample = _sample("many-tasks", [3, 2], [], hidden=256, inner=2048)
inputs = sample.make(torch.bfloat16, torch.device("cpu"), torch.Generator().manual_seed(0))
for _ in range(50):
    torch.ops.icae_fast.decode_step(**inputs)
"""
    result = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class RepeatedCalls:
    """A stand-in for CUDA graphs: a replay calls the function again and copies the result into the same tensor."""

    def __init__(self):
        self.runs = self.captures = self.replays = 0

    def run(self, function):
        self.runs += 1
        return function()

    def capture(self, function):
        self.captures += 1
        result = torch.empty(0)

        def replay():
            self.replays += 1
            logits = function()
            result.resize_(logits.shape).copy_(logits)

        return replay, result


@pytest.mark.skipif(backend_of("decode_step") == "reference", reason="the decode step has no fused kernel here")
def test_decoding_steps_through_a_graph_equal_a_full_forward(icae, tree, monkeypatch):
    graphs = []
    monkeypatch.setattr(decoding, "capture_on", lambda device: graphs.append(RepeatedCalls()) or graphs[-1])
    check_session(icae, tree, steps=7)
    (graph,) = graphs
    assert (graph.runs, graph.captures, graph.replays) == (2, 2, 4)  # two steps before rows leave, four after


def test_a_graph_is_captured_once_and_then_replayed():
    """Tokens, positions and lengths are read from device tensors, so a replay needs no value from the host."""
    seen, lengths = [], torch.tensor([4, 2], dtype=torch.int32)
    cos = torch.arange(10.0)[:, None]

    def compute(tokens, cos, sin):
        seen.append((tokens.tolist(), cos.flatten().tolist(), lengths.tolist()))
        return tokens[:, None].float()

    graph = StepGraph(compute, (cos, -cos), [6, 3], lengths, [1, 0], capture := RepeatedCalls())
    results = [graph.step(torch.tensor([10 + i, 20 + i])) for i in range(3)]
    assert [r.flatten().tolist() for r in results] == [
        [10, 20],
        [11, 21],
        [12, 22],
    ]  # results are not overwritten
    assert seen == [([20 + i, 10 + i], [6.0 + i, 3.0 + i], [5 + i, 3 + i]) for i in range(3)]
    assert (capture.runs, capture.captures, capture.replays) == (1, 1, 2)
