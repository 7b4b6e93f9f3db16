"""A cast of an ICAE sets its compute dtype, and its adapter stays the same."""

import copy

import pytest
import torch

from icae_fast import MemoryStore
from icae_fast.store.memory_file import load_memory, save_memory

CASTS = {
    "to": lambda icae: icae.to(torch.bfloat16),
    "bfloat16": lambda icae: icae.bfloat16(),
    "device and dtype": lambda icae: icae.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_keeps_the_adapter_and_its_memories(make_icae, random_ids, tmp_path, cast):
    icae = make_icae(slot_scale="embedding_norm")
    trained = {n: p.clone() for n, p in icae.named_parameters() if p.requires_grad}
    memory = icae.compress(random_ids(20))[0]
    save_memory(tmp_path / "m.icae", memory, icae)
    with MemoryStore(tmp_path / "store", icae) as store:
        store.put("a", memory)
        CASTS[cast](icae)
        assert icae.dtype == torch.bfloat16
        assert {p.dtype for p in icae.base_model.parameters()} == {torch.bfloat16}
        for name, p in icae.named_parameters():
            assert name not in trained or torch.equal(p, trained[name]), name
        loaded = load_memory(tmp_path / "m.icae", icae)
        assert loaded.slots.dtype == torch.bfloat16
        assert len(icae.generate(store.get("a"), [5], 3, 3, return_ids=True)[0]) == 3
    narrow = icae.compress(random_ids(20))[0].slots
    assert narrow.dtype == torch.bfloat16
    expected = make_icae(base=copy.deepcopy(icae.base_model), slot_scale="embedding_norm").compress(random_ids(20))
    assert torch.equal(narrow, expected[0].slots)


def test_a_cast_to_fp64_and_back(make_icae, random_ids):
    icae = make_icae()
    before = icae.adapter_hash()
    icae.double()
    assert {p.dtype for p in icae.parameters()} == {torch.float64}
    assert icae.compress(random_ids(20))[0].slots.dtype == torch.float64
    icae.float()
    assert {p.dtype for p in icae.parameters()} == {torch.float32}
    assert icae.adapter_hash() == before
