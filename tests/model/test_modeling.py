"""`ICAE` on tiny models: compressing, extending, the training forward, and the base model's state afterwards."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from helpers.tolerances import CLOSE_FP32
from icae_fast import Memory

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def sample(icae, context, answer):
    """Return (context, row, labels) of one autoencoding row: memory ids, AE, answer, with loss on the answer."""
    v, k = icae.vocabulary, icae.config.memory_size
    spans = -(-len(context) // icae.config.max_span_tokens)
    memory = torch.arange(v.first_memory, v.ae).repeat(spans)
    row = torch.cat((memory, torch.tensor([v.ae]), answer))
    labels = torch.cat((torch.full((spans * k + 1,), -100), answer))
    return context, row, labels


def pad(rows, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@pytest.fixture(scope="module")
def alone(tiny_icae, random_ids):
    """`alone(length, seed)`: the slots of a random document that was compressed by itself."""
    known = {}

    def slots(length, seed):
        if (length, seed) not in known:
            known[length, seed] = tiny_icae.compress(random_ids(length, seed))[0].slots
        return known[length, seed]

    return slots


@settings(max_examples=60)
@given(
    documents=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 3)), min_size=1, max_size=7),
    budget=st.integers(1, 200),
)
def test_slots_of_a_batch_equal_those_of_single_documents(tiny_icae, random_ids, alone, documents, budget):
    memories = tiny_icae.compress([random_ids(*d) for d in documents], token_budget=budget)
    assert len(memories) == len(documents)
    for memory, (length, seed) in zip(memories, documents, strict=True):
        torch.testing.assert_close(memory.slots, alone(length, seed), **CLOSE)
        assert memory.n_source_tokens == sum(memory.span_lengths) == length


def test_slots_do_not_depend_on_the_order_of_documents(tiny_icae, random_ids):
    documents = [random_ids(n, seed=n) for n in (3, 50, 16, 1)]
    forward, backward = tiny_icae.compress(documents), tiny_icae.compress(documents[::-1])
    for one, other in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(one.slots, other.slots, **CLOSE)


def test_each_span_is_compressed_by_itself(tiny_icae, random_ids):
    ids = random_ids(37)
    parts = tiny_icae.compress(list(ids.split((13, 13, 11))))
    whole = tiny_icae.compress(ids)[0]
    assert whole.span_lengths == (13, 13, 11)
    torch.testing.assert_close(whole.slots, torch.cat([p.slots for p in parts]), **CLOSE)


def test_progress_is_reported_in_tokens(tiny_icae, random_ids):
    calls = []
    tiny_icae.compress([random_ids(40), random_ids(5)], token_budget=20, on_progress=lambda *a: calls.append(a))
    assert calls == [(14, 45), (28, 45), (40, 45), (45, 45)]


def test_a_single_context_returns_a_list_of_one_memory(tiny_icae, random_ids):
    ids = random_ids(20)
    memories = tiny_icae.compress(ids)
    assert [type(m) for m in memories] == [Memory]
    for same in (ids.tolist(), tuple(ids.tolist()), ids.numpy(), [ids], [ids.numpy()], ids[None], ids.to(torch.int32)):
        assert torch.equal(tiny_icae.compress(same)[0].slots, memories[0].slots)


def test_sizes_and_repr_of_a_memory(tiny_icae, random_ids):
    memory = tiny_icae.compress(random_ids(37))[0]
    assert (memory.n_slots, memory.memory_size, memory.n_source_tokens) == (12, 4, 37)
    assert memory.slots.shape == (12, 32)
    assert memory.compression_ratio == pytest.approx(37 / 12)
    assert memory.nbytes == 12 * 32 * 4
    assert not memory.slots.requires_grad
    half = memory.to(torch.bfloat16)
    assert (half.slots.dtype, half.nbytes, half.span_lengths) == (torch.bfloat16, 12 * 32 * 2, (13, 13, 11))
    assert repr(half) == "Memory(37 tokens in 3 spans -> 12 slots, 1 KiB bfloat16)"


def test_text_and_its_token_ids_have_the_same_slots(make_icae, make_tokenizer):
    icae = make_icae(tokenizer=make_tokenizer())
    by_text, by_ids = icae.compress("w5 w6 w7")[0], icae.compress([5, 6, 7])[0]
    assert torch.equal(by_text.slots, by_ids.slots)
    mixed = icae.compress(["w5 w6 w7", [8, 9]])
    assert [m.n_source_tokens for m in mixed] == [3, 2]
    assert torch.equal(icae.extend(by_ids, "w8 w9").slots, icae.extend(by_text, [8, 9]).slots)


@pytest.mark.parametrize("parts", [(16, 16), (32, 16), (16, 32), (48, 48)])
def test_extending_full_spans_equals_compressing_the_whole(tiny_icae, random_ids, parts):
    ids = random_ids(sum(parts))
    extended = tiny_icae.extend(tiny_icae.compress(ids[: parts[0]])[0], ids[parts[0] :])
    whole = tiny_icae.compress(ids)[0]
    assert extended.span_lengths == whole.span_lengths
    assert extended.n_source_tokens == whole.n_source_tokens
    torch.testing.assert_close(extended.slots, whole.slots, **CLOSE)


@pytest.mark.parametrize("parts", [(1, 1), (16, 5), (5, 16), (20, 40), (33, 1)])
def test_extending_keeps_the_old_slots_unchanged(tiny_icae, random_ids, parts):
    ids = random_ids(sum(parts))
    old, new = tiny_icae.compress([ids[: parts[0]], ids[parts[0] :]])
    extended = tiny_icae.extend(old, ids[parts[0] :])
    assert torch.equal(extended.slots[: old.n_slots], old.slots)
    torch.testing.assert_close(extended.slots[old.n_slots :], new.slots, **CLOSE)
    assert extended.span_lengths == old.span_lengths + new.span_lengths
    assert extended.n_source_tokens == sum(parts)


def test_spread_positions_change_the_slots(make_icae, random_ids):
    append, spread = make_icae(), make_icae(memory_positions="spread")
    ids = random_ids(16)
    assert (append.compress(ids)[0].slots - spread.compress(ids)[0].slots).abs().max() > 0.05


def test_slot_scale_follows_its_formula_and_its_gain_has_a_gradient(make_icae, random_ids):
    plain, scaled = make_icae(), make_icae(slot_scale="embedding_norm")
    ids = random_ids(30)
    raw = plain.compress(ids)[0].slots
    mean_norm = plain.base_model.get_input_embeddings().weight.norm(dim=1).mean()
    with torch.no_grad():
        scaled.slot_gain.fill_(0.7)
    expected = raw / raw.norm(dim=1, keepdim=True) * mean_norm * torch.tensor(0.7).exp()
    slots = scaled.encode([ids])[0]
    torch.testing.assert_close(slots, expected, **CLOSE)
    assert plain.slot_gain is None
    slots.pow(2).sum().backward()
    # The derivative of sum((e^g c)^2) by g is twice that sum.
    torch.testing.assert_close(scaled.slot_gain.grad, 2 * expected.pow(2).sum(), rtol=1e-4, atol=0)


def test_forward_agrees_between_a_padded_batch_a_list_and_single_rows(tiny_icae, random_ids):
    sizes = [(5, 3), (33, 12), (16, 1)]
    rows = [sample(tiny_icae, random_ids(n, seed=n), random_ids(m, seed=m)) for n, m in sizes]
    contexts, prompts, labels = map(list, zip(*rows, strict=True))
    v = tiny_icae.vocabulary
    listed = tiny_icae(contexts, prompts, labels)
    padded = tiny_icae(pad(contexts, v.pad), pad(prompts, v.pad), pad(labels, -100), token_budget=30)
    torch.testing.assert_close(padded, listed, **CLOSE_FP32)
    assert listed["logits"].shape == (3, 25, v.n_base)
    losses = []
    for i, row in enumerate(rows):
        out = tiny_icae(*[[r] for r in row])
        losses.append(out["loss"] * sizes[i][1])
        torch.testing.assert_close(listed["logits"][i, : len(row[1])], out["logits"][0], rtol=1e-4, atol=1e-4)
        assert not listed["logits"][i, len(row[1]) :].any()
        shifted = torch.nn.functional.cross_entropy(out["logits"][0, :-1], row[2][1:])
        torch.testing.assert_close(out["loss"], shifted, **CLOSE)
    torch.testing.assert_close(listed["loss"], sum(losses) / sum(m for _, m in sizes), **CLOSE)
    assert tiny_icae(contexts, prompts)["loss"] is None


def test_every_trained_parameter_and_no_base_weight_gets_a_gradient(make_icae, random_ids, model_kind):
    icae = make_icae(model_kind, slot_scale="embedding_norm").train()
    trained = {name for name, p in icae.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in icae.named_parameters() if not n.startswith("base_model.")}
    assert not any(m.training for m in icae.base_model.modules())
    icae(*[[t] for t in sample(icae, random_ids(30), random_ids(8))])["loss"].backward()
    for name, parameter in icae.named_parameters():
        if name in trained:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
            assert torch.isfinite(parameter.grad).all(), name
        else:
            assert parameter.grad is None, name
    # The row uses the k memory tokens and AE, but neither LM nor FT.
    assert icae.memory_token_embed.weight.grad.abs().sum(1).gt(0).tolist() == [True] * 5 + [False] * 2


def test_dropout_follows_the_seed_in_training_and_is_off_in_evaluation(make_icae, random_ids):
    icae, ids = make_icae(lora_dropout=0.3), random_ids(30)

    def slots(seed):
        torch.manual_seed(seed)
        return icae.encode([ids])[0].detach()

    assert torch.equal(slots(0), slots(1))
    quiet = slots(0)
    icae.train()
    assert torch.equal(slots(0), slots(0))
    assert (slots(0) - slots(1)).abs().max() > 1e-3
    assert (slots(0) - quiet).abs().max() > 1e-3
    torch.manual_seed(0)
    first, second = icae.encode([ids])[0], icae.encode([ids])[0]
    assert not torch.equal(first, second)
    icae.eval()
    assert torch.equal(slots(3), quiet)
    icae = make_icae(lora_dropout=0.0).train()
    assert torch.equal(slots(0), slots(1))


def test_a_few_training_steps_lower_the_loss(make_icae, random_ids):
    icae = make_icae().train()
    row = [[t] for t in sample(icae, random_ids(20), random_ids(20))]
    optimizer = torch.optim.AdamW([p for p in icae.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = icae(*row)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


class TestTheBaseModelStaysUsable:
    """The base model behaves as before after an ICAE has used it and packed its q, k and v weights."""

    @pytest.fixture
    def used(self, make_base, make_icae, random_ids):
        """(base model, its logits before use, the ICAE that used it)."""
        base = make_base("qwen2")
        with torch.no_grad():
            before = base(random_ids(12)[None]).logits
        icae = make_icae(base=base)
        memory = icae.compress(random_ids(30))[0]
        icae.generate(memory, [5, 6], 3, return_ids=True)
        icae(*[[t] for t in sample(icae, random_ids(9), random_ids(5))])["loss"].backward()
        return base, before, icae

    def test_its_logits_are_the_same(self, used, random_ids):
        base, before, _ = used
        with torch.no_grad():
            torch.testing.assert_close(base(random_ids(12)[None]).logits, before, rtol=1e-6, atol=1e-6)
        out = base.generate(random_ids(4)[None], max_new_tokens=3, do_sample=False)
        assert out.shape == (1, 7)

    def test_its_weights_are_the_same(self, used, make_base):
        fresh = make_base("qwen2").state_dict()
        now = used[0].state_dict()
        assert list(now) == list(fresh)
        assert all(torch.equal(now[n], fresh[n]) for n in fresh)

    def test_it_can_be_saved_and_loaded(self, used, tmp_path):
        base = used[0]
        base.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        for name, value in base.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        weights_file = tmp_path / "model.safetensors"
        # Each weight is written once: the storage shared by q, k and v is not repeated for each of the three views.
        assert weights_file.stat().st_size < 1.1 * sum(p.nbytes for p in base.parameters()) + 8192

    def test_a_deep_copy_is_independent(self, used, random_ids):
        base, _, icae = used
        ids = random_ids(20)
        slots = icae.compress(ids)[0].slots
        copied = copy.deepcopy(icae)
        assert torch.equal(copied.compress(ids)[0].slots, slots)
        with torch.no_grad():
            copied.base_model.model.layers[0].self_attn.k_proj.weight.zero_()
        assert (copied.compress(ids)[0].slots - slots).abs().max() > 1e-2
        assert torch.equal(icae.compress(ids)[0].slots, slots)
        alone = copy.deepcopy(base)
        assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), base.parameters(), strict=True))

    def test_new_weights_take_effect(self, used, make_base, make_icae, random_ids):
        base, _, icae = used
        other = make_base("qwen2", seed=9)
        base.load_state_dict(other.state_dict())
        fresh = make_icae(base=other)
        fresh.memory_token_embed.load_state_dict(icae.memory_token_embed.state_dict())  # starts as base words
        expected = fresh.compress(random_ids(20))[0].slots
        torch.testing.assert_close(icae.compress(random_ids(20))[0].slots, expected, **CLOSE)
        with torch.no_grad():
            for layer in base.model.layers:
                layer.self_attn.v_proj.weight.mul_(2)
        assert (icae.compress(random_ids(20))[0].slots - expected).abs().max() > 1e-2

    def test_it_can_be_cast(self, used, random_ids):
        base, _, icae = used
        ids = random_ids(20)
        exact = icae.compress(ids)[0].slots
        base.to(torch.bfloat16)
        slots = icae.compress(ids)[0].slots
        assert slots.dtype == icae.dtype == torch.bfloat16
        # Rounding to 8-bit mantissas adds up over five layers of weights; a stale or unpacked weight would cause an
        # error as large as the slots themselves.
        assert (slots.float() - exact).pow(2).mean().sqrt() < 0.1 * exact.pow(2).mean().sqrt()
        a = base.model.layers[0].self_attn
        assert a.q_proj.weight.untyped_storage().data_ptr() == a.v_proj.weight.untyped_storage().data_ptr()
        base.to(torch.float32)
        icae.compress(ids)
        assert icae.adapter.layers[0]["q_A"].dtype == torch.float32


def test_an_fp64_model_computes_in_fp64(make_icae, make_base, random_ids):
    icae, single = make_icae(base=make_base().double()), make_icae()
    icae.adapter.load_state_dict(single.adapter.state_dict())
    icae.memory_token_embed.load_state_dict(single.memory_token_embed.state_dict())
    assert icae.memory_token_embed.weight.dtype == torch.float64
    slots = icae.compress(random_ids(20))[0].slots
    assert slots.dtype == torch.float64
    torch.testing.assert_close(slots.float(), single.compress(random_ids(20))[0].slots, rtol=1e-4, atol=1e-4)


def test_compress_applies_no_dropout_in_training_mode(make_icae, random_ids):
    icae = make_icae().train()
    ids = random_ids(50)
    assert torch.equal(icae.compress(ids)[0].slots, icae.compress(ids)[0].slots)
