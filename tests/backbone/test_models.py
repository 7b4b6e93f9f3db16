"""Every supported architecture against Hugging Face's forward with LoRA merged into the weights."""

import math

import pytest
import torch
from torch.func import functional_call
from transformers import DynamicCache

from icae_fast.backbone.families.table import view_of
from icae_fast.backbone.packing import packed, packed_qkv
from icae_fast.core.spans import span_lengths

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def merged_weights(icae):
    """Return base weights by name, q and v as `W + alpha / r * B A` with a graph to the LoRA factors."""
    weights = dict(icae.base_model.model.named_parameters())
    for i, layer in enumerate(icae.adapter.layers):
        for p in "qv":
            name = f"layers.{i}.self_attn.{p}_proj.weight"
            weights[name] = weights[name] + icae.config.lora_alpha / icae.config.lora_rank * (
                layer[f"{p}_B"] @ layer[f"{p}_A"]
            )
    return weights


def positions_by_hand(length, config):
    k = config.memory_size
    if config.memory_positions == "append":
        return [*range(length + k)]
    return [*range(length), *(max(0, (i + 1) * length // k - 1) for i in range(k))]


def hf_slots(icae, ids):
    """Compute slots by the Hugging Face model on each span and its memory tokens, with explicit positions."""
    config, weights = icae.config, merged_weights(icae)
    memory = icae.memory_token_embed.weight[: config.memory_size]
    slots = []
    for span in ids.split(span_lengths(len(ids), config)):
        x = torch.cat((icae.base_model.get_input_embeddings()(span), memory))[None]
        out = functional_call(
            icae.base_model.model,
            weights,
            kwargs={
                "inputs_embeds": x,
                "position_ids": torch.tensor([positions_by_hand(len(span), config)]),
                # Passed because transformers takes positions that do not rise by one for packed sequences.
                "attention_mask": torch.ones(x.shape[:2], dtype=torch.int64),
                "use_cache": False,
            },
        )
        slots.append(out.last_hidden_state[0, -config.memory_size :])
    return torch.cat(slots)


def hf_greedy(icae, embeddings, n, min_new_tokens=0):
    """Decode greedily by the base model from input embeddings, with Hugging Face's cache."""
    cache, ids = DynamicCache(), []
    x = embeddings[None]
    for step in range(n):
        out = icae.base_model(inputs_embeds=x, past_key_values=cache, use_cache=True)
        logits = out.logits[0, -1]
        if step < min_new_tokens:
            logits[list(icae.eos_token_ids)] = -math.inf
        ids.append(int(logits.argmax()))
        if ids[-1] in icae.eos_token_ids:
            break
        x = icae.base_model.get_input_embeddings()(torch.tensor([[ids[-1]]]))
    return ids


@pytest.mark.parametrize("positions", ["append", "spread"])
@pytest.mark.parametrize("length", [1, 3, 16, 37])
def test_slots_equal_hugging_face(make_icae, random_ids, model_kind, positions, length):
    icae = make_icae(model_kind, memory_positions=positions)
    ids = random_ids(length)
    with torch.no_grad():
        expected = hf_slots(icae, ids)
    slots = icae.compress(ids)[0].slots
    assert slots.std() > 0.1
    torch.testing.assert_close(slots, expected, **TOLERANCE)


@pytest.mark.parametrize("positions", ["append", "spread"])
def test_gradients_equal_hugging_face(make_icae, random_ids, model_kind, positions):
    icae = make_icae(model_kind, memory_positions=positions)
    ids = random_ids(29)
    named = dict(icae.reference_named_parameters())
    ours = icae.encode([ids])[0]
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((ours * weight).sum(), list(named.values()))
    expected = torch.autograd.grad((hf_slots(icae, ids) * weight).sum(), list(named.values()))
    for name, g, e in zip(named, got, expected, strict=True):
        limit = 1e-4 * e.abs().max().item() + 1e-6
        torch.testing.assert_close(g, e, rtol=1e-4, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
    # The first layers' factors and the memory tokens reach the slots; AE, LM and FT do not.
    assert all(g.abs().max() > 0 for g in got)
    assert not got[-1][icae.config.memory_size :].any()


def test_greedy_tokens_equal_hugging_face(make_icae, random_ids, model_kind):
    icae = make_icae(model_kind)
    memory = icae.compress(random_ids(40))[0]
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 1, 11)]
    with torch.no_grad():
        starts = [
            torch.cat((memory.slots, icae.tokens_to_embeddings(torch.tensor([icae.vocabulary.ft, *p]))))
            for p in prompts
        ]
        expected = [hf_greedy(icae, s, 12, min_new_tokens=3) for s in starts]
        restored = hf_greedy(
            icae, torch.cat((memory.slots, icae.tokens_to_embeddings(torch.tensor([icae.vocabulary.ae])))), 12
        )
    assert icae.generate(memory, prompts, 12, min_new_tokens=3, return_ids=True) == expected
    assert icae.restore(memory, max_new_tokens=12, return_ids=True) == restored


def test_teacher_forced_logits_equal_hugging_face(make_icae, random_ids, model_kind):
    icae = make_icae(model_kind)
    v, context, answer = icae.vocabulary, random_ids(21), random_ids(9, seed=1)
    memory_ids = torch.arange(v.first_memory, v.ae).repeat(2)
    row = torch.cat((memory_ids, torch.tensor([v.ae]), answer))
    with torch.no_grad():
        logits = icae([context], [row])["logits"][0]
        x = torch.cat((icae.compress(context)[0].slots, icae.tokens_to_embeddings(row[len(memory_ids) :])))
        expected = icae.base_model(inputs_embeds=x[None]).logits[0]
    assert logits.shape == (len(row), v.n_base)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_window_matters(make_icae, random_ids):
    """Removing the window changes the slots, so the tests above would detect a missing window."""
    for kind, field in (("mistral", "sliding_window"), ("qwen2-window", "sliding_window")):
        icae, ids = make_icae(kind), random_ids(16)
        before = icae.compress(ids)[0].slots
        assert any(icae.backbone.windows), field
        icae.backbone.windows = [0] * icae.backbone.n_layers
        assert (icae.compress(ids)[0].slots - before).abs().max() > 0.05


def test_layers_without_a_window_have_none(make_icae):
    assert make_icae("qwen2-window").backbone.windows == [0, 5, 5]
    assert make_icae("qwen2").backbone.windows == make_icae("mistral-full").backbone.windows == [0, 0, 0]
    assert make_icae("mistral").backbone.windows == [7, 7, 7]


def test_packed_weights_share_memory_with_the_modules(make_base, model_kind):
    base = make_base(model_kind)
    attention, layer = base.model.layers[0].self_attn, view_of(base).layer(0)
    values = [p.detach().clone() for m in (attention.q_proj, attention.k_proj, attention.v_proj) for p in [m.weight]]
    weight, bias = packed_qkv(layer)
    assert torch.equal(weight, torch.cat(values))
    assert (bias is None) == (attention.q_proj.bias is None)
    with torch.no_grad():
        attention.k_proj.weight[1] = 7.0
        if bias is not None:
            attention.v_proj.bias.fill_(3.0)
    row = attention.q_proj.weight.shape[0] + 1
    assert (weight[row] == 7.0).all()
    assert bias is None or (bias[-attention.v_proj.bias.shape[0] :] == 3.0).all()
    again, _ = packed_qkv(layer)
    assert again.data_ptr() == weight.data_ptr() == attention.q_proj.weight.data_ptr()


MODULES = ("self_attn.o_proj", "mlp", "mlp.gate_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_with_hooks_is_called(make_icae, random_ids, name):
    icae, calls = make_icae(), []
    before = icae.compress(random_ids(16))[0].slots
    module = icae.base_model.model.layers[1].get_submodule(name)
    module.register_forward_hook(lambda *_: calls.append(name))
    torch.testing.assert_close(icae.compress(random_ids(16))[0].slots, before, **TOLERANCE)
    assert calls == [name]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_is_trained_gets_its_gradient(make_icae, random_ids, name):
    """The package freezes the base model, but a user who unfreezes a part of it gets its gradient."""
    icae, ids = make_icae(), random_ids(29)
    parameters = list(icae.base_model.model.layers[1].get_submodule(name).requires_grad_(True).parameters())
    got = torch.autograd.grad(icae.encode([ids])[0].square().sum(), parameters)
    expected = torch.autograd.grad(hf_slots(icae, ids).square().sum(), parameters)
    for g, e in zip(got, expected, strict=True):
        assert g.abs().max() > 0
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


def test_gate_and_up_share_memory_with_the_modules(make_base):
    mlp = make_base("llama3").model.layers[0].mlp
    values = torch.cat([mlp.gate_proj.weight.detach().clone(), mlp.up_proj.weight.detach().clone()])
    weight, bias = packed((mlp.gate_proj, mlp.up_proj))
    assert torch.equal(weight, values)
    assert weight.data_ptr() == mlp.gate_proj.weight.data_ptr()
    assert bias.data_ptr() == mlp.gate_proj.bias.data_ptr()
