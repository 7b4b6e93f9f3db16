"""The prefix tree of slot KV: what it computes, what it keeps, and when it lets go."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from icae_fast.cache import DecoderRows, KVSegment
from icae_fast.errors import InvalidInputError
from icae_fast.kv_tree import SlotKVTree
from icae_fast.slot_kv import memory_pieces

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (1, 4, 3, 2)


def hf_path(base, pieces):
    """(n_layers, total, Hkv, D) keys and values of the Hugging Face model reading all pieces at once."""
    cache = DynamicCache()
    with torch.no_grad():
        base(inputs_embeds=torch.cat(list(pieces))[None], past_key_values=cache)
    return tuple(
        torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in cache.layers]) for name in ("keys", "values")
    )


def assert_same(got, expected):
    """Equal to 1e-5 of the largest value."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_path(segments, pieces, expected):
    """One segment a piece, at its place, and together what is expected."""
    assert [s.length for s in segments] == [len(p) for p in pieces]
    assert [s.start for s in segments] == [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    assert all(t.transpose(1, 2).is_contiguous() for s in segments for t in (s.keys, s.values))
    assert_same(torch.cat([s.keys for s in segments], 1), expected[0])
    assert_same(torch.cat([s.values for s in segments], 1), expected[1])


@pytest.fixture
def icae(make_icae):
    return make_icae()


@pytest.fixture(scope="session")
def make_pieces():
    """`make_pieces(lengths=LENGTHS, seed=0)`: random embeddings of the tiny models."""

    def make(lengths=LENGTHS, seed=0):
        return torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(seed)).split(list(lengths))

    return make


def test_a_path_equals_hugging_face(make_icae, model_kind, make_pieces):
    icae, pieces = make_icae(model_kind), make_pieces()
    expected = hf_path(icae.base_model, pieces)
    assert_path(icae.slot_kv.path(pieces), pieces, expected)
    icae.clear_kv()
    for n in (1, 3, 4):  # each behind what is kept
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


def test_the_same_bytes_elsewhere_are_another_node(icae, make_pieces):
    a, b, *_ = make_pieces()
    tree = icae.slot_kv
    (first,), (_, second) = tree.path([a]), tree.path([b, a])
    assert second.start == len(b)
    assert (first.keys - second.keys).abs().max() > 0.1
    whole = torch.cat((a, b))
    assert tree.path([whole])[0].length == len(whole)
    assert len(tree) == 4


class PlainTree:
    """What the tree should do, written out: nodes by their path, evicting the leaf that was used longest ago."""

    def __init__(self, budget, lengths, bytes_per_token):
        self.budget, self.used, self.clock = budget, {}, 0
        self.size = lambda path: lengths[path[-1]] * bytes_per_token
        self.lengths = lengths

    @property
    def nbytes(self):
        return sum(map(self.size, self.used))

    def ask(self, paths):
        """Tokens that must be computed."""
        nodes = [[tuple(p[: i + 1]) for i in range(len(p))] for p in paths]
        missing = {n for path in nodes for n in path if n not in self.used}
        for path in nodes:
            self.clock += 1
            fits = sum(map(self.size, path)) <= self.budget
            self.used |= {n: self.clock for n in path if fits or n in self.used}
            self.evict()
        return sum(self.lengths[n[-1]] for n in missing)

    def adopt(self, path, n):
        """Tokens that must be computed when the last n pieces are given."""
        before = [tuple(path[: i + 1]) for i in range(len(path) - n)]
        missing = [node for node in before if node not in self.used]
        if sum(self.lengths[j] for j in path) * (self.size((0,)) // self.lengths[0]) > self.budget:
            return 0
        self.ask([path])
        return sum(self.lengths[node[-1]] for node in missing)

    def evict(self):
        while self.nbytes > self.budget:
            leaves = [n for n in self.used if not any(o[:-1] == n for o in self.used)]
            del self.used[min(leaves, key=self.used.get)]


PATHS = st.lists(st.integers(0, 3), max_size=4)
ASKED = st.lists(PATHS, min_size=1, max_size=3)
ADOPTED = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 4))


@settings(max_examples=120)
@given(
    steps=st.lists(ASKED | ADOPTED, min_size=1, max_size=8),
    budget=st.integers(0, 14),
    shrunk=st.none() | st.integers(0, 6),
)
def test_any_sequence_of_paths_does_as_a_plain_tree(tiny_icae, make_pieces, steps, budget, shrunk):
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
            assert sum(computed) == model.ask(paths)
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


def test_adopted_segments_are_found_and_not_copied(icae, make_icae, make_pieces, count_tokens):
    a, b, c, d = make_pieces()
    given = make_icae().slot_kv.path([a, b, c])[1:]
    calls = count_tokens(icae)
    assert icae.slot_kv.adopt([a, b, c], given)
    assert calls == [len(a)]
    path = icae.slot_kv.path([a, b, c, d])
    assert path[1:3] == given
    assert calls == [len(a), len(d)]
    assert_path(path, (a, b, c, d), hf_path(icae.base_model, (a, b, c, d)))
    again = make_icae().slot_kv.path([a, b])[1:]
    assert icae.slot_kv.adopt([a, b], again)
    assert icae.slot_kv.path([a, b])[1] is given[0]
    other = icae.slot_kv.path([b])  # the same bytes at another place
    assert other[0] is not given[0]


def test_adopted_segments_are_evicted_as_others_are(icae, make_icae, make_pieces):
    a, b, c, d = make_pieces()
    tree, given = icae.slot_kv, make_icae().slot_kv.path([a, b, c])[1:]
    per_token = given[0].nbytes // given[0].length
    tree.byte_budget = per_token * (len(a) + len(b) + len(c) + len(d)) - 1
    assert tree.adopt([a, b, c], given)
    tree.path([d])  # takes the room of c, the leaf
    assert (len(tree), tree.nbytes) == (3, per_token * (len(a) + len(b) + len(d)))
    assert tree.path([a, b])[1] is given[0]
    assert_path(tree.path([a, b, c]), (a, b, c), hf_path(icae.base_model, (a, b, c)))


def test_an_adopted_path_over_the_budget_changes_nothing(icae, make_icae, make_pieces, count_tokens):
    a, b, c, _ = make_pieces()
    given = make_icae().slot_kv.path([a, b, c])[1:]
    (kept,) = icae.slot_kv.path([b])
    icae.kv_budget = kept.nbytes // kept.length * (len(a) + len(b) + len(c)) - 1
    calls = count_tokens(icae)
    assert not icae.slot_kv.adopt([a, b, c], given)
    assert calls == []
    assert icae.slot_kv.path([b]) == [kept]
    assert len(icae.slot_kv) == 1
    assert_path(icae.slot_kv.path([a, b, c]), (a, b, c), hf_path(icae.base_model, (a, b, c)))
    assert calls == [sum(map(len, (a, b, c)))]


def test_adopted_segments_go_with_the_weights(icae, make_icae, make_pieces):
    pieces = make_pieces()
    assert icae.slot_kv.adopt(pieces, make_icae().slot_kv.path(pieces))
    with torch.no_grad():
        icae.base_model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert_path(icae.slot_kv.path(pieces), pieces, hf_path(icae.base_model, pieces))


BAD_SEGMENTS = {
    "none": (lambda s: [], "0 segments for 4 pieces"),
    "more than pieces": (lambda s: [s[0], *s], "5 segments for 4 pieces"),
    "another length": (lambda s: s[2:3], r"keys of a segment are \(3, 3, 2, 8\).*takes \(3, 2, 2, 8\)"),
    "another dtype": (lambda s: [KVSegment(s[3].keys.double(), s[3].values, 8)], "keys .* torch.float64"),
    "another device": (lambda s: [KVSegment(s[3].keys, s[3].values.to("meta"), 8)], "values .* on meta"),
    "another layer count": (lambda s: [KVSegment(s[3].keys[:2], s[3].values, 8)], r"\(2, 2, 2, 8\)"),
    "values of fewer heads": (lambda s: [KVSegment(s[3].keys, s[3].values[:, :, :1], 8)], "values of a segment"),
    "spread heads": (lambda s: [KVSegment(s[3].keys.mT.contiguous().mT, s[3].values, 8)], "side by side"),
    "another start": (lambda s: [KVSegment(s[3].keys, s[3].values, 7)], "starts at position 7, but its piece at 8"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_SEGMENTS.values(), ids=BAD_SEGMENTS)
def test_segments_that_do_not_fit_are_refused(icae, make_pieces, spoil, message):
    pieces = make_pieces()
    segments = SlotKVTree(icae.backbone).path(pieces)
    with pytest.raises(InvalidInputError, match=message):
        icae.slot_kv.adopt(pieces, spoil(segments))
    assert len(icae.slot_kv) == 0


def test_segments_in_use_outlive_their_eviction(icae, make_pieces):
    pieces = make_pieces()
    segments = icae.slot_kv.path(pieces)
    icae.kv_budget = 0
    assert len(icae.slot_kv) == icae.slot_kv.nbytes == 0
    icae.clear_kv()
    assert_path(segments, pieces, hf_path(icae.base_model, pieces))


@pytest.mark.parametrize("budget", [-1, 1.5, True, None])
def test_a_budget_is_a_number_of_bytes(icae, budget):
    with pytest.raises(InvalidInputError, match="byte budget"):
        icae.kv_budget = budget
    assert icae.kv_budget == 1 << 30


@pytest.mark.parametrize(
    "piece", [torch.zeros(0, 32), torch.zeros(3, 31), torch.zeros(32), torch.zeros(2, 32, dtype=torch.int64), [0.0]]
)
def test_pieces_are_embeddings(icae, make_pieces, piece):
    with pytest.raises(InvalidInputError, match="a piece of a path"):
        icae.slot_kv.path([*make_pieces(), piece])
    assert len(icae.slot_kv) == 0


def test_nothing_is_kept_of_a_forward_that_fails(icae, make_pieces):
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
def test_other_weights_are_noticed(icae, make_base, make_pieces, change):
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


def test_what_is_not_noticed_is_cleared_by_hand(icae, make_pieces):
    """The limit of the guard: one value, written behind the version counter's back, and none of those looked at."""
    pieces = make_pieces()
    before = icae.slot_kv.path(pieces)
    icae.base_model.model.layers[0].self_attn.v_proj.weight.data[0, 1] += 5.0
    assert icae.slot_kv.path(pieces) == before
    icae.clear_kv()
    after = icae.slot_kv.path(pieces)
    assert (after[0].values - before[0].values).abs().max() > 0.1
    assert_path(after, pieces, hf_path(icae.base_model, pieces))


def test_packing_weights_is_no_change(icae, make_pieces):
    first = icae.slot_kv.path(make_pieces())  # the first forward moves the weights into blocks
    assert icae.slot_kv.path(make_pieces()) == first


def test_threads_share_the_tree(icae, make_pieces):
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
def test_copies_begin_empty_with_their_own_weights(icae, make_pieces, copied):
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


def test_autocast_does_not_reach_what_is_kept(icae, make_pieces):
    pieces = make_pieces()
    with torch.autocast("cpu", torch.bfloat16):
        segments = icae.slot_kv.path(pieces)
    assert_path(segments, pieces, hf_path(icae.base_model, pieces))


def test_rows_keep_what_they_were_given(icae, make_pieces):
    """Rows read behind segments; those that are left after others went still find their own keys."""
    a, b, *_ = icae.slot_kv.path(make_pieces())
    rows = DecoderRows(icae.backbone, [[a], [a, b], []], [4, 2, 3], icae.dtype, icae.device)
    assert rows.nbytes == rows.keys.nbytes + rows.values.nbytes + a.nbytes + b.nbytes
    x = icae.embed(torch.arange(3, 9))
    layout = rows.append([3, 1, 2])
    assert layout.positions.tolist() == [a.length, a.length + 1, a.length + 2, a.length + b.length, 0, 1]
    icae.backbone.forward(x, layout, cache=rows)
    before = [rows.tail(i) for i in range(3)]
    rows.keep([0, 2])
    for (keys, values), place in zip((before[0], before[2]), (0, 1), strict=True):
        assert torch.equal(rows.tail(place)[0], keys)
        assert torch.equal(rows.tail(place)[1], values)
    assert rows.shared.rows == ((0, 1),)
    with pytest.raises(ValueError, match="does not fit"):
        rows.append([2, 1])


def test_memory_pieces_are_the_template_and_the_spans(icae, random_ids):
    memory = icae.compress(random_ids(40))[0]
    template, *spans = memory_pieces(icae, memory, [7, 8])
    assert torch.equal(template, icae.embed(torch.tensor([7, 8])))
    assert [len(s) for s in spans] == [4, 4, 4]
    assert torch.equal(torch.cat(spans), memory.slots)
    assert len(memory_pieces(icae, memory)) == 3
    assert memory_pieces(icae, memory.to(torch.bfloat16))[0].dtype == torch.float32


def test_a_second_question_reads_the_memory_no_more(icae, random_ids, count_tokens):
    icae.base_model.generation_config.eos_token_id = []
    memory = icae.compress(random_ids(40))[0]
    calls = count_tokens(icae)
    first = icae.generate(memory, [[5, 6]], 3, return_ids=True)
    assert calls == [12, 3, 1, 1]
    icae.generate(memory, [[7], [8, 9]], 1, return_ids=True)
    icae.restore(memory, 1, return_ids=True)
    assert calls[4:] == [2 + 3, 1]
    icae.kv_budget = 0
    assert icae.generate(memory, [[5, 6]], 3, return_ids=True) == first
    assert calls[6:] == [12, 3, 1, 1]


def test_extending_computes_the_new_span_alone(icae, random_ids, count_tokens):
    memory = icae.compress(random_ids(32))[0]
    before = icae.slot_kv.path(memory_pieces(icae, memory))
    longer = icae.extend(memory, random_ids(9, seed=1))
    calls = count_tokens(icae)
    after = icae.slot_kv.path(memory_pieces(icae, longer))
    assert calls == [4]
    assert after[:2] == before
    assert (after[2].start, after[2].length) == (8, 4)
    pieces = memory_pieces(icae, longer)
    assert_path(after, pieces, hf_path(icae.base_model, pieces))


def test_memories_share_the_template(icae, random_ids, count_tokens):
    memories = icae.compress([random_ids(16), random_ids(30, seed=1)])
    calls = count_tokens(icae)
    paths = icae.slot_kv.paths([memory_pieces(icae, m, [7, 8, 9]) for m in memories])
    assert calls == [3 + 4 + 8]
    assert paths[0][0] is paths[1][0]
