"""An ICAE computes the same under autocast, inference mode and torch.compile, and serves training after each."""

import copy
import logging

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}


def row_of(icae, ids):
    v = icae.vocabulary
    row = torch.cat((torch.arange(v.first_memory, v.ae), torch.tensor([v.ae]), ids[:5]))
    return [ids], [row], [torch.cat((torch.full((5,), -100), ids[:5]))]


def everything(icae, ids):
    """Return slots, an answer, a restored text, keys and guesses."""
    memory = icae.compress(ids)[0]
    longer = icae.extend(memory, ids[:6])
    rows = row_of(icae, ids)
    return {
        "slots": longer.slots,
        "encoded": icae.encode([ids])[0].detach(),
        "keys": icae.memory_kv(memory).keys,
        "answer": torch.tensor(icae.generate(memory, [[5, 6], [7]], 4, min_new_tokens=4, return_ids=True)),
        "sampled": torch.tensor(icae.generate(memory, [5], 4, 4, return_ids=True, do_sample=True, seed=1)),
        "guesses": icae.token_guesses(*rows),
        "losses": icae.token_losses(*rows).losses.detach(),
        "logits": icae(*rows)["logits"].detach(),
    }


def gradients(icae, ids, call):
    icae.zero_grad()
    call(icae, row_of(icae, ids)).backward()
    return {n: p.grad.clone() for n, p in icae.named_parameters() if p.grad is not None}


LOSSES = {
    "token_losses": lambda icae, rows: icae.token_losses(*rows).losses.mean(),
    "forward": lambda icae, rows: icae(*rows)["loss"],
    "logits": lambda icae, rows: icae(*rows[:2])["logits"].float().logsumexp(-1).mean(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama-gelu", "qwen3"])
@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_the_mode(make_base, make_icae, random_ids, mode, kind, dtype):
    icaes = [make_icae(base=make_base(kind).to(dtype), slot_scale="embedding_norm") for _ in range(2)]
    for icae in icaes:
        icae.adapter_mode = "fused"
    expected = everything(icaes[0], random_ids(13))
    with MODES[mode]():
        found = everything(icaes[1], random_ids(13))
    if mode == "inference" or kind != "llama-gelu":
        # Modules that the ops do not compute are run without autocast, too.
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found["slots"].dtype == dtype
    assert not any(p.is_inference() for p in icaes[1].parameters())


@pytest.mark.parametrize("kind", ["llama", "llama-gelu"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_training_step_under_autocast(make_icae, random_ids, loss, kind):
    icae = make_icae(kind, slot_scale="embedding_norm", lora_dropout=0.0).train()
    expected = gradients(icae, random_ids(13), LOSSES[loss])
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(icae, random_ids(13), LOSSES[loss])  # torch: call backward outside; it works either way
        value = LOSSES[loss](icae, row_of(icae, random_ids(13)))
    if kind == "llama" and loss != "logits":
        torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-5)
    else:  # torch's own backward of modules is narrow there
        assert inside.keys() == expected.keys()
    icae.zero_grad()
    value.backward()
    outside = {n: p.grad for n, p in icae.named_parameters() if p.grad is not None}
    torch.testing.assert_close(outside, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter_mode", ["fused", "merged"])
def test_training_works_after_inference_mode(make_icae, random_ids, adapter_mode):
    expected = gradients(make_icae(), random_ids(13), LOSSES["token_losses"])
    icae = make_icae()
    icae.adapter_mode = adapter_mode
    with torch.inference_mode():
        memory = icae.compress(random_ids(13))[0]
        icae.generate(memory, [5], 3, return_ids=True)
        kv = icae.memory_kv(memory)
    assert not any(t.is_inference() for t in (memory.slots, kv.keys, *icae.parameters()))
    found = gradients(icae, random_ids(13), LOSSES["token_losses"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    rows = row_of(icae, random_ids(13))
    icae.token_losses(*rows, slots=[memory.slots.requires_grad_()]).losses.sum().backward()
    assert memory.slots.grad.abs().max() > 0
    assert torch.equal(icae.compress(random_ids(13))[0].slots, memory.slots)


def test_a_model_loaded_in_inference_mode_compresses(make_base, make_icae, random_ids):
    expected = make_icae().compress(random_ids(13))[0].slots
    with torch.inference_mode():
        icae = make_icae(base=copy.deepcopy(make_base()))
    memory = icae.compress(random_ids(13))[0]
    torch.testing.assert_close(memory.slots, expected, rtol=1e-5, atol=1e-5)
    assert len(icae.generate(memory, [5], 3, 3, return_ids=True)[0]) == 3


def test_a_compiled_function_may_use_an_icae(make_icae, random_ids, caplog):
    icae, ids = make_icae(), random_ids(13)
    rows = row_of(icae, ids)

    def use(scale):
        memory = icae.compress(ids)[0]
        answer = icae.generate(memory, [5, 6], 4, min_new_tokens=4, return_ids=True)
        return (memory.slots * scale).sum() + icae.token_losses(*rows).losses.mean() * scale, answer

    scale = torch.tensor(2.0)
    expected, answer = use(scale)
    with caplog.at_level(logging.WARNING):
        found, again = torch.compile(use, backend="eager")(scale)
    assert answer == again
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.backward()
    assert icae.memory_token_embed.weight.grad.abs().max() > 0
    assert len(caplog.records) < 5, [r.getMessage() for r in caplog.records]
