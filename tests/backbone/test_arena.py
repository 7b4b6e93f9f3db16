"""Gathering a model's matrices into one block leaves the model's behaviour unchanged."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from icae_fast.backbone.arena import gather_weights
from icae_fast.ops import EXTENSION_ERROR

if EXTENSION_ERROR is not None:
    pytest.skip(f"there are no C++ kernels: {EXTENSION_ERROR}", allow_module_level=True)

KINDS = ["llama", "llama-mha", "llama3", "qwen3"]  # llama-mha ties its head to its embedding


def storages(model):
    return {p.untyped_storage().data_ptr() for n, p in model.named_parameters() if n.endswith("proj.weight")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_as_it_was(make_base, kind, tmp_path):
    model = make_base(kind)
    before = copy.deepcopy(model)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    parameters = dict(model.named_parameters())
    gather_weights(model)
    assert len(storages(model)) == 1
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, before(ids).logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), before.parameters(), strict=True))


def test_only_what_was_moved_apart_is_gathered_again(make_base):
    model = make_base("llama")
    gather_weights(model)
    places = [p.data_ptr() for p in model.parameters()]
    gather_weights(model)
    assert [p.data_ptr() for p in model.parameters()] == places
    model.to(torch.float64)
    assert len(storages(model)) > 1
    gather_weights(model)
    assert len(storages(model)) == 1
    assert model.lm_head.weight.dtype == torch.float64


def test_answers_leave_the_weights_gathered(make_icae, random_ids):
    """Packing q, k and v, or gate and up, finds them adjacent and does not move them out of the block."""
    icae = make_icae("llama-mha")
    memory = icae.compress(random_ids(20))[0]
    icae.generate(memory, [[5, 6]], 3, return_ids=True)
    places = [p.data_ptr() for p in icae.base_model.parameters()]
    assert len(storages(icae.base_model)) == 1
    memory = icae.compress(random_ids(20, seed=1))[0]
    icae.generate(memory, [[5, 6]], 3, return_ids=True)
    assert [p.data_ptr() for p in icae.base_model.parameters()] == places
