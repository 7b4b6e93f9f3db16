"""A module that does more than its class's forward is called, or refused in a sentence."""

import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from icae_fast.errors import UnsupportedModelError


def uses(icae, ids):
    """Return what reads and decodes: named functions without arguments."""
    v = icae.vocabulary
    row = torch.cat((torch.arange(v.first_memory, v.ae), torch.tensor([v.ae]), ids[:5]))
    labels = torch.cat((torch.full((5,), -100), ids[:5]))
    memory = icae.compress(ids)[0]
    return {
        "compress": lambda: icae.compress(ids),
        "answer": lambda: icae.generate(memory, [5, 6], 4, min_new_tokens=4, return_ids=True),
        "losses": lambda: icae.token_losses([ids], [row], [labels]).losses.sum().backward(),
        "forward": lambda: icae([ids], [row], [labels])["loss"].backward(),
    }


UNCALLED = ["", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
CALLED = ["input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp", "mlp.gate_proj", "mlp.down_proj"]


@pytest.fixture
def used(make_icae, random_ids):
    """(ICAE, its uses); its memory is not in the slot KV, so that an answer reads it."""
    icae = make_icae()
    icae.kv_budget = 0
    return icae, uses(icae, random_ids(13))


def register(module, kind, calls):
    if kind == "forward":
        return module.register_forward_hook(lambda *_: calls.append(1))
    if kind == "pre":
        return module.register_forward_pre_hook(lambda *_: calls.append(1))
    return module.register_full_backward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("name", UNCALLED)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_on_modules_that_are_never_called_are_refused(used, name, kind):
    icae, functions = used
    handle = register(icae.base_model.model.layers[1].get_submodule(name), kind, calls := [])
    for function in functions.values():
        with pytest.raises(
            UnsupportedModelError, match=f"{name or 'a decoder layer'} .* has hooks or a forward that was"
        ):
            function()
    handle.remove()
    for function in functions.values():
        function()
    assert not calls


@pytest.mark.parametrize("name", CALLED)
def test_hooks_on_other_modules_are_called_while_reading_and_decoding(used, name):
    icae, functions = used
    expected = functions["answer"]()
    handle = icae.base_model.model.layers[1].get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    for use, least in {"compress": 1, "answer": 5, "losses": 2, "forward": 2}.items():
        calls = []
        found = functions[use]()
        assert len(calls) >= least, use
        assert use != "answer" or found == expected
    handle.remove()
    calls = []
    functions["answer"]()
    assert not calls


def test_hooks_of_all_modules_are_refused(used):
    _, functions = used
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnsupportedModelError, match="has hooks"):
            functions["compress"]()
    finally:
        handle.remove()
    functions["compress"]()
    with FlopCounterMode(display=False):  # its hooks only note where it is
        functions["compress"]()


@pytest.mark.parametrize("name", [*UNCALLED, *CALLED])
def test_a_forward_replaced_on_an_instance(used, name):
    icae, functions = used
    module = icae.base_model.model.layers[1].get_submodule(name)
    calls, forward = [], module.forward
    module.forward = lambda *a, **k: (calls.append(1), forward(*a, **k))[1]
    for function in functions.values():
        if name in UNCALLED:
            with pytest.raises(UnsupportedModelError, match="replaced"):
                function()
        else:
            calls.clear()
            function()
            assert calls
    calls.clear()
    module.forward = forward  # as libraries put it back
    for function in functions.values():
        function()
    assert not calls


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "self_attn.o_proj"])
def test_a_parametrized_module(used, name):
    """A parametrization changes the weight: it counts in the answer, or is refused."""
    icae, functions = used
    module = icae.base_model.model.layers[1].get_submodule(name)
    before = icae.compress(torch.arange(3, 16))[0].slots

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(module, "weight", Half())
    if "q_proj" in name or "v_proj" in name:
        for function in functions.values():
            with pytest.raises(UnsupportedModelError, match=f"{name} is a .*Parametrized.*remove_parametrizations"):
                function()
        return
    halved = icae.compress(torch.arange(3, 16))[0].slots
    answer = functions["answer"]()
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    torch.testing.assert_close(icae.compress(torch.arange(3, 16))[0].slots, halved, rtol=1e-5, atol=3e-5)
    assert functions["answer"]() == answer
    assert not torch.allclose(halved, before)


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj"], ["down_proj", "o_proj"], ["lm_head"]])
def test_a_peft_adapter_added_later(used, targets):
    from peft import LoraConfig, get_peft_model

    icae, functions = used
    get_peft_model(icae.base_model, LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    if targets[0] in ("q_proj", "v_proj"):
        for function in functions.values():
            with pytest.raises(UnsupportedModelError, match=re.escape("merge_and_unload()")):
                function()
        return
    functions["answer"]()
    functions["losses"]()
    trained = {n for n, p in icae.base_model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("lora_" in n for n in trained), trained


def test_the_recorder_that_transformers_leaves_behind_changes_nothing(used, random_ids):
    icae, functions = used
    expected = functions["answer"]()
    icae.base_model(random_ids(5)[None], output_hidden_states=True, output_attentions=True)
    assert functions["answer"]() == expected
    functions["losses"]()
