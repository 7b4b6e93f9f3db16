"""The benchmark of stored slots measures the slots that a store returns."""

import pytest
import torch

from bench.quality.quantized_slots import restoration, slots_changed, stored
from icae_fast import MemoryStore
from icae_fast.training.methods.objectives import autoencoding_sample, pad_samples


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_it_measures_what_a_store_returns(tiny_icae, random_ids, tmp_path, dtype):
    ids = random_ids(30)
    memory = tiny_icae.compress(ids)[0]
    with MemoryStore(tmp_path / "store", tiny_icae, dtype=dtype) as store:
        store.put("a", memory)
        assert torch.equal(stored(memory.slots, dtype), store.get("a").slots)
    batch = pad_samples(tiny_icae, [autoencoding_sample(tiny_icae, ids.tolist())])
    with torch.no_grad():
        before = tiny_icae(**batch)["loss"].item()
        with slots_changed(tiny_icae, lambda rows: [stored(row, dtype) for row in rows]):
            assert (tiny_icae(**batch)["loss"].item() == before) == (dtype is None)
        assert tiny_icae(**batch)["loss"].item() == before


def test_figures_of_all_dtypes(tiny_icae, random_ids):
    result = restoration(tiny_icae, [random_ids(16), random_ids(16, seed=1)])
    assert result["slot_error"]["own"] == 0
    assert 0 < result["slot_error"]["bfloat16"] < result["slot_error"]["int8"] < 0.02
    swapped = restoration(tiny_icae, [random_ids(16)] * 2)
    assert swapped["loss_from_others"] == pytest.approx(swapped["loss"]["own"])
    assert result["loss_from_others"] != pytest.approx(result["loss"]["own"])
    assert all(abs(loss - result["loss"]["own"]) < 0.1 for loss in result["loss"].values())
