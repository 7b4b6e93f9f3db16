"""A real model, SmolLM2-135M-Instruct: accuracy against the reference's way of computing, text in and text out."""

import copy

import pytest
import torch
from transformers import DynamicCache

from icae_fast import ICAE, ICAEConfig

QUESTIONS = ["Who kept the light?", "In one short sentence, what is this text about?"]


def make(model, tokenizer):
    """The default configuration (k = 128, rank 128) with an adapter that acts."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        icae = ICAE.from_base(model, ICAEConfig(), tokenizer).eval()
        with torch.no_grad():
            for _, _, factor, parameter in icae.adapter.named_factors():
                if factor == "B":
                    parameter.normal_(0.0, 0.02)
    return icae


@pytest.fixture(scope="module")
def fp32(smollm2):
    return make(*smollm2)


@pytest.fixture(scope="module")
def bf16(smollm2_bf16, fp32):
    icae = make(*smollm2_bf16)
    icae.adapter.load_state_dict(fp32.adapter.state_dict())
    icae.memory_token_embed.load_state_dict(fp32.memory_token_embed.state_dict())
    return icae


@pytest.fixture(scope="module")
def ids(smollm2, long_text):
    """The first 700 tokens of the text: two spans of 350."""
    return torch.tensor(smollm2[1](long_text)["input_ids"][:700])


@pytest.fixture(scope="module")
def slots(fp32, ids):
    """Our fp32 slots of those tokens."""
    return fp32.compress(ids)[0].slots


def rms(t):
    return t.float().pow(2).mean().sqrt().item()


@pytest.fixture(scope="module")
def baseline_slots(fp32, bf16, ids):
    """Slots of the reference's computation (PEFT, whole model, span after span), in fp32 and in bf16."""
    pytest.importorskip("peft", reason="the baseline needs PEFT, which comes with the extra `bench`")
    from bench.baseline import BaselineICAE

    return tuple(BaselineICAE.from_icae(icae).compress(ids[None]).float() for icae in (fp32, bf16))


def test_fp32_slots_equal_the_baseline(slots, baseline_slots):
    error = (slots - baseline_slots[0]).abs().max().item()
    assert error < 1e-4 * rms(slots)


def test_bf16_slots_err_no_more_than_the_baseline(bf16, ids, baseline_slots):
    """Distance to the baseline in bf16 is within what bf16 itself costs the baseline; so is that to fp32."""
    exact, rounded = baseline_slots
    ours = bf16.compress(ids)[0].slots.float()
    budget = 1.5 * rms(rounded - exact)
    assert 0 < budget < 0.2 * rms(exact)
    assert rms(ours - rounded) <= budget
    assert rms(ours - exact) <= budget


def test_the_adapter_acts(fp32, slots, ids):
    """Guards the two tests above: without the LoRA the slots are far away."""
    idle = copy.copy(fp32)
    idle._modules = dict(fp32._modules)
    idle.adapter = copy.deepcopy(fp32.adapter)
    idle.adapter.reset_parameters()
    assert rms(idle.compress(ids)[0].slots - slots) > 0.1 * rms(slots)


def test_three_documents_equal_one_at_a_time(fp32, ids):
    documents = [ids[:90], ids[90:101], ids[101:260]]
    batch = fp32.compress(documents)
    backwards = fp32.compress(documents[::-1], token_budget=300)[::-1]
    for document, memory, other in zip(documents, batch, backwards, strict=True):
        alone = fp32.compress(document)[0].slots
        for slots in (memory.slots, other.slots):
            assert (slots - alone).abs().max().item() < 1e-5 * rms(alone) * 10
            assert rms(slots - alone) < 1e-5 * rms(alone)


def test_greedy_tokens_equal_hugging_face(fp32, slots, ids):
    memory = fp32.compress(ids)[0]
    prefix, suffix = fp32.prompt_ids(QUESTIONS[0])
    parts = (fp32.tokens_to_embeddings(torch.tensor(p)) for p in (prefix, suffix))
    x, cache, expected = torch.cat((next(parts), slots, next(parts)))[None], DynamicCache(), []
    with torch.no_grad():
        for _ in range(8):
            logits = fp32.base_model(inputs_embeds=x, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            expected.append(int(logits.argmax()))
            x = fp32.embed(torch.tensor([expected[-1:]]))
    got = fp32.generate(memory, QUESTIONS[0], max_new_tokens=8, return_ids=True)[0]
    assert got == expected[: len(got)]
    assert len(got) == 8 or got[-1] in fp32.eos_token_ids


def test_two_prompts_in_bf16_give_text(bf16, ids, long_text):
    text = bf16.tokenizer.decode(ids)
    assert long_text.startswith(text)
    memory = bf16.compress(text)[0]
    assert memory.span_lengths == (350, 350)
    assert memory.slots.shape == (256, 576)
    assert memory.slots.dtype == torch.bfloat16
    answers = bf16.generate(memory, QUESTIONS, max_new_tokens=6, min_new_tokens=6)
    rows = bf16.generate(memory, QUESTIONS, max_new_tokens=6, min_new_tokens=6, return_ids=True)
    assert answers == [bf16.tokenizer.decode(r, skip_special_tokens=True) for r in rows]
    assert all(isinstance(a, str) and a for a in answers)
    assert all(len(r) == 6 and not set(r) & set(bf16.eos_token_ids) for r in rows)
    assert isinstance(bf16.restore(memory, max_new_tokens=3), str)


def test_the_chat_template_stands_around_slots_and_prompt(fp32):
    tokenizer, ft = fp32.tokenizer, fp32.vocabulary.ft
    prefix, suffix = fp32.prompt_ids(QUESTIONS[0])
    question = tokenizer(QUESTIONS[0])["input_ids"]
    assert tokenizer.decode(prefix) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n"
    )
    assert suffix[: 1 + len(question)] == [ft, *question]
    assert tokenizer.decode(suffix[1 + len(question) :]) == "<|im_end|>\n<|im_start|>assistant\n"


def test_text_and_its_tokens_give_the_same_memory(fp32, ids):
    text = fp32.tokenizer.decode(ids[:60])
    by_text, by_ids = fp32.compress(text)[0], fp32.compress(ids[:60])[0]
    assert by_text.n_source_tokens == 60
    assert torch.equal(by_text.slots, by_ids.slots)


def test_the_tokenizer_fits_the_vocabulary(fp32):
    v = fp32.vocabulary
    assert (v.n_base, v.pad, v.first_memory, v.ae, v.lm, v.ft) == (49152, 49152, 49153, 49281, 49282, 49283)
    assert fp32.eos_token_ids == (2,)
    assert fp32.max_positions == 8192
    assert fp32.config.base_model == "smollm2-135m-instruct"
