"""A pickled ICAE holds each weight once, and a copy computes the same."""

import copy
import io
import pickle

import pytest
import torch

from icae_fast import ICAE


def saved(value):
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


def from_saved(data):
    return torch.load(io.BytesIO(data), weights_only=False)


WAYS = {"pickle": (pickle.dumps, pickle.loads), "torch": (saved, from_saved)}


def used(icae, ids):
    memory = icae.compress(ids)[0]
    return memory.slots, icae.generate(memory, [[5, 6], [7]], 5, min_new_tokens=5, return_ids=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_holds_each_weight_once(make_base, make_icae, random_ids, model_kind, way):
    dump, load = WAYS[way]
    icae = make_icae(model_kind, slot_scale="embedding_norm")
    icae.kv_budget, icae.decode_budget, icae.max_positions = 12345, 1 << 20, 99
    before = len(dump(icae))
    expected = used(icae, random_ids(30))
    data = dump(icae)
    assert len(data) < before * 1.02
    again = load(data)
    assert type(again) is ICAE
    slots, ids = used(again, random_ids(30))
    torch.testing.assert_close(slots, expected[0], rtol=1e-5, atol=3e-5)
    assert ids == expected[1]
    assert (again.kv_budget, again.decode_budget, again.max_positions) == (12345, 1 << 20, 99)
    assert again.backbone.view.model is again.base_model
    assert again.slot_kv.backbone is again.backbone
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in icae.parameters()]
    tied = icae.base_model.lm_head.weight is icae.base_model.get_input_embeddings().weight
    assert tied == (again.base_model.lm_head.weight is again.base_model.get_input_embeddings().weight)


def test_pickling_changes_nothing(make_icae, random_ids):
    icae = make_icae()
    used(icae, random_ids(30))
    places = [p.data_ptr() for p in icae.parameters()]
    pickle.dumps(icae)
    assert [p.data_ptr() for p in icae.parameters()] == places


def test_a_deep_copy_has_its_own_weights_once(make_icae, random_ids):
    icae = make_icae()
    expected = used(icae, random_ids(30))
    twin = copy.deepcopy(icae)
    assert twin.backbone.view.model is twin.base_model is not icae.base_model
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in icae.parameters())
    for p in twin.parameters():
        assert p.untyped_storage().nbytes() == p.nbytes
    torch.testing.assert_close(used(twin, random_ids(30))[0], expected[0], rtol=1e-5, atol=3e-5)
