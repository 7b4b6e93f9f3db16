"""The prefix tree of slot KV: what it computes, what it keeps, and when it evicts."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.kv import LENGTHS, assert_path, assert_same, hf_path
from icae_fast.errors import InvalidInputError
from icae_fast.kv.tree import SlotKVTree

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def icae(make_icae):
    return make_icae()


def test_keys_and_values_of_a_path_equal_hugging_face(make_icae, model_kind, make_pieces):
    icae, pieces = make_icae(model_kind), make_pieces()
    expected = hf_path(icae.base_model, pieces)
    assert_path(icae.slot_kv.path(pieces), pieces, expected)
    icae.clear_kv()
    for n in (1, 3, 4):  # each path extends the one kept before
        assert_path(icae.slot_kv.path(pieces[:n]), pieces[:n], tuple(t[:, : sum(LENGTHS[:n])] for t in expected))


def test_shared_missing_pieces_are_computed_once_in_one_forward(make_icae, model_kind, make_pieces, count_tokens):
    icae = make_icae(model_kind)
    a, b, c, d = make_pieces()
    calls = count_tokens(icae)
    paths = [[a, b, c], [a, b, d], [a], [b, a], [], [a, b, c, d]]
    for path, segments in zip(paths, icae.slot_kv.paths(paths), strict=True):
        if path:
            assert_path(segments, path, hf_path(icae.base_model, path))
        else:
            assert segments == []
    assert calls == [sum(map(len, (a, b, c, d))) + len(d) + len(b) + len(a)]
    first, second, *_ = again = icae.slot_kv.paths(paths)
    assert len(calls) == 1
    assert first[:2] == second[:2] == again[-1][:2]
    assert len(icae.slot_kv) == 7
    assert icae.slot_kv.nbytes == sum({id(s): s.nbytes for path in again for s in path}.values())


def test_a_piece_behind_another_prefix_is_a_separate_node(icae, make_pieces):
    a, b, *_ = make_pieces()
    tree = icae.slot_kv
    (first,), (_, second) = tree.path([a]), tree.path([b, a])
    assert second.start == len(b)
    assert (first.keys - second.keys).abs().max() > 0.1
    whole = torch.cat((a, b))
    assert tree.path([whole])[0].length == len(whole)
    assert len(tree) == 4


class PlainTree:
    """A plain model of the tree: nodes are keyed by their path, and the least recently used leaf is evicted first."""

    def __init__(self, budget, lengths, bytes_per_token):
        self.budget, self.used, self.clock = budget, {}, 0
        self.size = lambda path: lengths[path[-1]] * bytes_per_token
        self.lengths = lengths

    @property
    def nbytes(self):
        return sum(map(self.size, self.used))

    def request(self, paths):
        """Request paths and return the number of tokens that must be computed."""
        nodes = [[tuple(p[: i + 1]) for i in range(len(p))] for p in paths]
        missing = {n for path in nodes for n in path if n not in self.used}
        for path in nodes:
            self.clock += 1
            fits = sum(map(self.size, path)) <= self.budget
            self.used |= {n: self.clock for n in path if fits or n in self.used}
            self.evict()
        return sum(self.lengths[n[-1]] for n in missing)

    def adopt(self, path, n):
        """Adopt the last n pieces of a path and return the number of tokens that must be computed before them."""
        before = [tuple(path[: i + 1]) for i in range(len(path) - n)]
        missing = [node for node in before if node not in self.used]
        if sum(self.lengths[j] for j in path) * (self.size((0,)) // self.lengths[0]) > self.budget:
            return 0
        self.request([path])
        return sum(self.lengths[node[-1]] for node in missing)

    def evict(self):
        while self.nbytes > self.budget:
            leaves = [n for n in self.used if not any(o[:-1] == n for o in self.used)]
            del self.used[min(leaves, key=self.used.get)]


PATHS = st.lists(st.integers(0, 3), max_size=4)
REQUESTED = st.lists(PATHS, min_size=1, max_size=3)
ADOPTED = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 4))


@settings(max_examples=120)
@given(
    steps=st.lists(REQUESTED | ADOPTED, min_size=1, max_size=8),
    budget=st.integers(0, 14),
    shrunk=st.none() | st.integers(0, 6),
)
def test_random_requests_and_adoptions_behave_like_the_plain_tree(tiny_icae, make_pieces, steps, budget, shrunk):
    pieces, backbone, computed = make_pieces(), tiny_icae.backbone, []
    per_token = 2 * 4 * backbone.n_layers * backbone.num_kv_heads * backbone.head_dim
    tree, model = SlotKVTree(backbone, budget * per_token), PlainTree(budget * per_token, LENGTHS, per_token)
    known, elsewhere = {}, SlotKVTree(backbone)
    with pytest.MonkeyPatch.context() as patch:
        forward = backbone.forward
        patch.setattr(backbone, "forward", lambda x, *a, **k: (computed.append(len(x)), forward(x, *a, **k))[1])
        for i, paths in enumerate(steps):
            if isinstance(paths, tuple):
                path, n = paths[0], min(paths[1], len(paths[0]))
                whole = [pieces[j] for j in path]
                segments = elsewhere.path(whole)[-n:]
                computed.clear()
                fits = sum(LENGTHS[j] for j in path) <= tree.byte_budget // per_token
                assert tree.adopt(whole, segments) == fits
                assert sum(computed) == model.adopt(path, n)
                assert (len(tree), tree.nbytes) == (len(model.used), model.nbytes)
                paths = [path]
            computed.clear()
            found = tree.paths([[pieces[j] for j in path] for path in paths])
            assert sum(computed) == model.request(paths)
            assert (len(tree), tree.nbytes) == (len(model.used), model.nbytes)
            assert tree.nbytes <= tree.byte_budget
            for path, segments in zip(paths, found, strict=True):
                assert [s.length for s in segments] == [LENGTHS[j] for j in path]
                for n, segment in enumerate(segments):
                    first = known.setdefault(tuple(path[: n + 1]), segment)
                    assert segment.start == first.start
                    assert_same(segment.keys, first.keys)
                    assert_same(segment.values, first.values)
            if shrunk is not None and i == len(steps) // 2:
                tree.byte_budget = model.budget = shrunk * per_token
                model.evict()
                assert (len(tree), tree.nbytes) == (len(model.used), model.nbytes)


def test_a_path_over_the_budget_is_computed_and_not_kept(icae, make_pieces):
    a, b, c, d = make_pieces()
    tree = icae.slot_kv
    (kept,) = tree.path([a])
    tree.byte_budget = kept.nbytes * sum(map(len, (a, b, c))) // len(a)
    assert_path(tree.path([a, b, c, d]), (a, b, c, d), hf_path(icae.base_model, (a, b, c, d)))
    assert tree.path([a]) == [kept]
    assert len(tree) == 1
    tree.path([a, b, c])
    assert len(tree) == 3
    assert tree.nbytes == tree.byte_budget


def test_segments_in_use_outlive_their_eviction(icae, make_pieces):
    pieces = make_pieces()
    segments = icae.slot_kv.path(pieces)
    icae.kv_budget = 0
    assert len(icae.slot_kv) == icae.slot_kv.nbytes == 0
    icae.clear_kv()
    assert_path(segments, pieces, hf_path(icae.base_model, pieces))


@pytest.mark.parametrize("budget", [-1, 1.5, True, None])
def test_a_budget_that_is_no_number_of_bytes_is_refused(icae, budget):
    with pytest.raises(InvalidInputError, match="byte budget"):
        icae.kv_budget = budget
    assert icae.kv_budget == 1 << 30


@pytest.mark.parametrize(
    "piece", [torch.zeros(0, 32), torch.zeros(3, 31), torch.zeros(32), torch.zeros(2, 32, dtype=torch.int64), [0.0]]
)
def test_pieces_that_are_no_embeddings_are_refused(icae, make_pieces, piece):
    with pytest.raises(InvalidInputError, match="a piece of a path"):
        icae.slot_kv.path([*make_pieces(), piece])
    assert len(icae.slot_kv) == 0


def test_a_failing_forward_leaves_nothing_in_the_tree(icae, make_pieces):
    pieces = make_pieces()
    icae.slot_kv.path(pieces[:1])
    broken = icae.backbone.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        icae.slot_kv.path(pieces)
    broken.remove()
    assert len(icae.slot_kv) == 1
    assert_path(icae.slot_kv.path(pieces), pieces, hf_path(icae.base_model, pieces))


def by_data(base, other):
    for p, q in zip(base.parameters(), other.parameters(), strict=True):
        p.data.copy_(q)


def by_new_parameter(base, _):
    base.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(
        base.model.layers[1].mlp.down_proj.weight.detach() * 2, requires_grad=False
    )


CHANGES = {
    "load_state_dict": lambda base, other: base.load_state_dict(other.state_dict()),
    "one value in place": lambda base, _: base.model.layers[0].mlp.up_proj.weight[3, 4].add_(9.0),
    "other weights through .data": by_data,
    "a new parameter": by_new_parameter,
    "dtype": lambda base, _: base.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_noticed(icae, make_base, make_pieces, change):
    pieces = make_pieces()
    before = icae.slot_kv.path(pieces)
    with torch.no_grad():
        change(icae.base_model, make_base(seed=9))
    pieces = [p.to(icae.dtype) for p in pieces]
    after = icae.slot_kv.path(pieces)
    assert_path(after, pieces, hf_path(icae.base_model, pieces))
    assert after[0].keys.dtype == icae.dtype
    assert len(icae.slot_kv) == 4
    assert all(s is not t for s, t in zip(before, after, strict=True))


def test_an_unnoticed_weight_change_requires_clear_kv(icae, make_pieces):
    """The check misses one value that it does not sample, written through `.data`, which skips the version counter."""
    pieces = make_pieces()
    before = icae.slot_kv.path(pieces)
    icae.base_model.model.layers[0].self_attn.v_proj.weight.data[0, 1] += 5.0
    assert icae.slot_kv.path(pieces) == before
    icae.clear_kv()
    after = icae.slot_kv.path(pieces)
    assert (after[0].values - before[0].values).abs().max() > 0.1
    assert_path(after, pieces, hf_path(icae.base_model, pieces))


def test_packing_weights_is_not_taken_for_a_change(icae, make_pieces):
    first = icae.slot_kv.path(make_pieces())  # the first forward packs the weights
    assert icae.slot_kv.path(make_pieces()) == first


def test_threads_can_share_the_tree(icae, make_pieces):
    pieces, tree = make_pieces(), icae.slot_kv
    tree.byte_budget = 12 * tree.path(pieces[:1])[0].nbytes
    paths = [[(i + j) % 4 for j in range(1 + i % 4)] for i in range(24)]
    expected = {tuple(p): hf_path(icae.base_model, [pieces[j] for j in p]) for p in paths}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda path: tree.path([pieces[j] for j in path]), paths))
    for path, segments in zip(paths, found, strict=True):
        assert_path(segments, [pieces[j] for j in path], expected[tuple(path)])
    assert 0 < tree.nbytes <= tree.byte_budget


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda icae: pickle.loads(pickle.dumps(icae))])
def test_copies_start_with_an_empty_tree_and_their_own_weights(icae, make_pieces, copied):
    pieces = make_pieces()
    icae.kv_budget = 1 << 20
    before = icae.slot_kv.path(pieces)
    other = copied(icae)
    assert (len(other.slot_kv), other.kv_budget) == (0, 1 << 20)
    with torch.no_grad():
        other.base_model.model.layers[0].self_attn.k_proj.weight.mul_(2.0)
    assert_path(other.slot_kv.path(pieces), pieces, hf_path(other.base_model, pieces))
    assert icae.slot_kv.path(pieces) == before


def test_segments_made_in_inference_mode_are_plain_tensors(icae, make_pieces):
    pieces = make_pieces()
    with torch.inference_mode():
        segments = icae.slot_kv.path([p.clone() for p in pieces])
    assert not any(s.keys.is_inference() or s.keys.requires_grad for s in segments)
    assert_path(segments, pieces, hf_path(icae.base_model, pieces))


def test_autocast_does_not_affect_kept_segments(icae, make_pieces):
    pieces = make_pieces()
    with torch.autocast("cpu", torch.bfloat16):
        segments = icae.slot_kv.path(pieces)
    assert_path(segments, pieces, hf_path(icae.base_model, pieces))
