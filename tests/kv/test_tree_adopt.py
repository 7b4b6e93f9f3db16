"""Adopting segments from a file or another tree: the tree keeps them without computing them."""

import pytest
import torch

from helpers.kv import assert_path, hf_path
from icae_fast.errors import InvalidInputError
from icae_fast.kv.segments import KVSegment
from icae_fast.kv.tree import SlotKVTree

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def icae(make_icae):
    return make_icae()


def test_adopted_segments_are_used_without_copying(icae, make_icae, make_pieces, count_tokens):
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
    other = icae.slot_kv.path([b])  # the same piece behind another prefix
    assert other[0] is not given[0]


def test_adopted_segments_are_evicted_like_computed_ones(icae, make_icae, make_pieces):
    a, b, c, d = make_pieces()
    tree, given = icae.slot_kv, make_icae().slot_kv.path([a, b, c])[1:]
    per_token = given[0].nbytes // given[0].length
    tree.byte_budget = per_token * (len(a) + len(b) + len(c) + len(d)) - 1
    assert tree.adopt([a, b, c], given)
    tree.path([d])  # evicts c, the leaf
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


def test_adopted_segments_are_dropped_when_weights_change(icae, make_icae, make_pieces):
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
