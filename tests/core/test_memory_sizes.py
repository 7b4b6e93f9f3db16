"""Compression with the first k' of k memory tokens, by `encode(memory_size=)` and by `with_memory_size`."""

import pytest
import torch

from helpers import golden
from icae_fast import ICAE
from icae_fast.core.spans import count_spans, memory_positions, pack_spans
from icae_fast.errors import ConfigError, InvalidInputError
from icae_fast.training.methods.objectives import autoencoding_sample, instruction_sample, pad_samples, with_memory_size


@pytest.fixture(scope="module", params=["append", "spread"])
def icae(request, make_icae):
    """An ICAE with k = 4 and rate 4, so spans of 16 tokens; dropout is active in training mode."""
    return make_icae(memory_positions=request.param, slot_scale="embedding_norm", lora_dropout=0.3)


@pytest.mark.parametrize("memory_size", [1, 2, 4])
def test_a_smaller_icae_has_the_slots_of_encode(icae, random_ids, memory_size):
    contexts = [random_ids(n, seed=n) for n in (1, 3, 16, 17, 50)]
    with torch.no_grad():
        expected = icae.encode(contexts, memory_size=memory_size)
    memories = icae.with_memory_size(memory_size).compress(contexts)
    for ids, slots, memory in zip(contexts, expected, memories, strict=True):
        assert len(slots) == count_spans(len(ids), icae.config) * memory_size == memory.n_slots
        assert memory.memory_size == memory_size
        torch.testing.assert_close(memory.slots, slots, rtol=1e-5, atol=1e-5)
    full = icae.compress(contexts)
    assert all(memory.span_lengths == other.span_lengths for memory, other in zip(memories, full, strict=True))


def test_fewer_slots_are_a_prefix_of_all_slots_with_append_positions(make_icae, random_ids):
    """With `append`, later memory tokens do not affect the first k'; with `spread`, k' changes all positions."""
    same = {}
    for positions in ("append", "spread"):
        icae, ids = make_icae(memory_positions=positions), random_ids(16)
        with torch.no_grad():
            (full,), (half,) = icae.encode([ids]), icae.encode([ids], memory_size=2)
        same[positions] = torch.allclose(full[:2], half, rtol=1e-4, atol=1e-4)
    assert same == {"append": True, "spread": False}


def test_positions_of_fewer_memory_tokens(icae):
    spread = [7, 15] if icae.config.memory_positions == "spread" else [16, 17]
    assert memory_positions(16, icae.config, 2).tolist() == spread
    rows = pack_spans([16, 3], icae.config, 2)
    assert rows.cu_seqlens.tolist() == [0, 18, 23]
    assert rows.out_rows.tolist() == [16, 17, 21, 22]
    assert rows.positions[16:18].tolist() == spread


def test_a_smaller_icae_is_saved_and_loaded(icae, random_ids, tmp_path):
    smaller, ids = icae.with_memory_size(2), random_ids(40)
    assert (smaller.config.memory_size, smaller.config.compression_rate) == (2, 8)
    smaller.save_pretrained(tmp_path)
    loaded = ICAE.from_pretrained(tmp_path, icae.base_model)
    assert loaded.config == smaller.config
    assert loaded.adapter_hash() == smaller.adapter_hash() != icae.adapter_hash()
    torch.testing.assert_close(loaded.compress(ids)[0].slots, smaller.compress(ids)[0].slots, rtol=1e-5, atol=1e-5)
    smaller.max_positions = 3  # settings of one do not affect the other
    assert icae.max_positions == 256


def test_special_ids_depend_on_k_and_keep_their_embeddings(icae):
    smaller = icae.with_memory_size(2)
    for name in ("ae", "lm", "ft"):
        ids = [torch.tensor([getattr(model.vocabulary, name)]) for model in (icae, smaller)]
        torch.testing.assert_close(smaller.tokens_to_embeddings(ids[1]), icae.tokens_to_embeddings(ids[0]))
        assert ids[0] - ids[1] == 2


def test_a_smaller_icae_shares_all_weights_except_memory_tokens(icae, random_ids):
    smaller = icae.with_memory_size(2)
    assert smaller.base_model is icae.base_model
    shared = {id(p) for p in icae.parameters()}
    own = [name for name, p in smaller.named_parameters() if id(p) not in shared]
    assert own == ["memory_token_embed.weight"]
    assert smaller.memory_token_embed.weight.requires_grad
    icae.train()
    try:
        assert not smaller.adapter.training
        smaller.eval()
        assert icae.adapter.training
    finally:
        icae.eval()
    full, half = (model.compress(random_ids(20))[0] for model in (icae, smaller))
    assert len(smaller.restore(half, max_new_tokens=3, return_ids=True)) > 0
    with pytest.raises(InvalidInputError, match="use the model that made"):
        smaller.restore(full, return_ids=True)


def test_with_memory_size_leaves_the_random_generator_unchanged(icae):
    before = torch.get_rng_state()
    icae.with_memory_size(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("memory_size", "told"),
    [(0, "must be 1 to 4"), (5, "must be 1 to 4"), (3, "cannot be shared by 3"), (True, "True"), (2.0, "2.0")],
)
def test_bad_memory_sizes_are_refused(tiny_icae, random_ids, memory_size, told):
    with pytest.raises(ConfigError, match=told):
        tiny_icae.with_memory_size(memory_size)
    if memory_size != 3:  # `encode` accepts 3; only the compression rate would not be an integer
        with pytest.raises(InvalidInputError, match="from 1 to 4"):
            tiny_icae.encode([random_ids(9)], memory_size=memory_size)


def test_gradients_reach_only_the_first_memory_tokens(icae, random_ids):
    slots = icae.encode([random_ids(20)], memory_size=2)[0]
    grad, *factors = torch.autograd.grad(slots.sum(), [icae.memory_token_embed.weight, *icae.adapter.parameters()])
    assert (grad[:2] != 0).any(dim=1).all()
    assert (grad[2:] == 0).all()
    assert all((f != 0).any() for f in factors)


def test_training_samples_can_have_fewer_slots():
    icae = ICAE.from_reference_checkpoint(golden.reference_checkpoint_path(), golden.load_base())
    context = golden.case("three_spans")["input_ids"][0].tolist()
    smaller, k = icae.with_memory_size(2), icae.config.memory_size
    pairs = []
    for make in (lambda m: autoencoding_sample(m, context), lambda m: instruction_sample(m, context, [30, 31], [40])):
        sample, expected = with_memory_size(icae, make(icae), 2), make(smaller)
        moved = [i - (k - 2) if i >= icae.vocabulary.ae else i for i in sample.prompt_answer_ids]
        assert moved == expected.prompt_answer_ids
        assert (sample.labels, sample.input_ids) == (expected.labels, context)
        assert with_memory_size(icae, make(icae), k) == make(icae)
        pairs.append((make(icae), sample))
    with pytest.raises(InvalidInputError, match="6 memory ids; its 3 spans of 8 slots need 24"):
        with_memory_size(icae, pairs[0][1], 2)
    assert torch.isfinite(smaller(**pad_samples(smaller, [autoencoding_sample(smaller, context)]))["loss"])
