"""SmolLM2-135M-Instruct, a real model: accuracy against the reference's computation, and text input and output."""

import pytest
import torch
from transformers import DynamicCache

from icae_fast import ICAE, ICAEConfig

QUESTIONS = ["Who kept the light?", "In one short sentence, what is this text about?"]


@pytest.fixture(scope="module", autouse=True)
def threads():
    """Run the module with one thread, which is much faster on busy cores; the value is the usual number of threads."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield usual
    torch.set_num_threads(usual)


def make(model, tokenizer, **config):
    """Make an ICAE whose adapter matters: with B of this size, LoRA moves the slots by an eighth of their RMS."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        icae = ICAE.from_base(model, ICAEConfig(**config), tokenizer).eval()
        with torch.no_grad():
            for _, _, factor, parameter in icae.adapter.named_factors():
                if factor == "B":
                    parameter.normal_(0.0, 0.2)
    return icae


def same_in_bf16(icae, model):
    """Return an ICAE with the same adapter on the bf16 model."""
    other = ICAE.from_base(model, icae.config, icae.tokenizer).eval()
    other.adapter.load_state_dict(icae.adapter.state_dict())
    other.memory_token_embed.load_state_dict(icae.memory_token_embed.state_dict())
    return other


@pytest.fixture(scope="module")
def fp32(smollm2):
    """An ICAE in the default configuration: k = 128 and rank 128."""
    return make(*smollm2)


@pytest.fixture(scope="module")
def bf16(fp32, smollm2_bf16):
    return same_in_bf16(fp32, smollm2_bf16[0])


@pytest.fixture(scope="module")
def small(smollm2):
    """A fast ICAE: k = 16 and spans of up to 64 tokens."""
    return make(*smollm2, memory_size=16, lora_rank=16)


@pytest.fixture(scope="module")
def ids(smollm2, long_text):
    """The first 700 tokens of the text, two spans of 350 in the default configuration."""
    return torch.tensor(smollm2[1](long_text)["input_ids"][:700])


def rms(t):
    return t.float().pow(2).mean().sqrt().item()


@pytest.fixture(scope="module")
def baseline_slots(fp32, bf16, ids):
    """Slots computed like the reference (PEFT, the whole model, span by span), in fp32 and in bf16."""
    pytest.importorskip("peft", reason="the baseline needs PEFT, which comes with the extra `bench`")
    from icae_fast.benchmark.baseline import BaselineICAE

    return tuple(BaselineICAE.from_icae(icae).compress(ids[None]).float() for icae in (fp32, bf16))


@pytest.fixture
def in_mode():
    """`in_mode(icae, mode)`: set the ICAE's adapter mode until the test ends, and return the ICAE."""
    changed = []

    def change(icae, mode):
        changed.append((icae, icae.adapter_mode))
        icae.adapter_mode = mode
        return icae

    yield change
    for icae, mode in reversed(changed):
        icae.adapter_mode = mode


@pytest.mark.parametrize(("n_threads", "mode"), [(1, "fused"), ("usual", "fused"), (1, "merged")])
def test_fp32_slots_equal_the_baseline(fp32, ids, baseline_slots, threads, n_threads, in_mode, mode):
    exact = baseline_slots[0]
    in_mode(fp32, mode)
    torch.set_num_threads(threads if n_threads == "usual" else 1)
    memory = fp32.compress(ids)[0]
    torch.set_num_threads(1)
    assert memory.span_lengths == (350, 350)
    assert memory.slots.shape == exact.shape == (256, 576)
    assert (memory.slots - exact).abs().max().item() < 1e-4 * rms(exact)
    assert rms(memory.slots - exact) < 5e-6 * rms(exact)


@pytest.mark.parametrize("mode", ["fused", "merged"])
def test_bf16_slots_err_no_more_than_the_baseline(bf16, ids, baseline_slots, in_mode, mode):
    """The distances to the bf16 and fp32 baselines stay within 1.5 times the distance between these two."""
    exact, rounded = baseline_slots
    ours = in_mode(bf16, mode).compress(ids)[0].slots.float()
    assert bf16.adapter_mode_in_use == mode
    budget = 1.5 * rms(rounded - exact)
    assert 0 < budget < 0.2 * rms(exact)
    assert rms(ours - rounded) <= budget
    assert rms(ours - exact) <= budget


def test_both_adapter_modes_agree_up_to_rounding(fp32, bf16, ids, in_mode):
    pytest.importorskip("peft", reason="the tolerances are defined beside the baseline, which needs PEFT")
    from icae_fast.benchmark.checks import assert_same, rms_difference

    wide, narrow = ([in_mode(i, m).compress(ids[:60])[0].slots for m in ("fused", "merged")] for i in (fp32, bf16))
    assert rms_difference(*wide) < 1e-5
    assert_same(*narrow, torch.bfloat16, "fused and merged slots")


def test_the_adapters_effect_exceeds_the_rounding_of_bf16(fp32, bf16, ids):
    """The accuracy tests above are meaningful only if LoRA moves the slots by much more than bf16 rounding does."""
    idle = ICAE.from_base(fp32.base_model, fp32.config)
    idle.memory_token_embed.load_state_dict(fp32.memory_token_embed.state_dict())
    exact = fp32.compress(ids[:40])[0].slots
    effect = rms(idle.compress(ids[:40])[0].slots - exact)
    assert effect > 0.05 * rms(exact)
    assert effect > 3 * rms(bf16.compress(ids[:40])[0].slots - exact)


def test_a_batch_of_three_documents_equals_one_at_a_time(small, ids):
    documents = [ids[:90], ids[90:101], ids[101:230]]
    batch = small.compress(documents)
    backwards = small.compress(documents[::-1], token_budget=130)[::-1]
    for document, memory, other in zip(documents, batch, backwards, strict=True):
        alone = small.compress(document)[0].slots
        for slots in (memory.slots, other.slots):
            assert rms(slots - alone) < 1e-5 * rms(alone)
            assert (slots - alone).abs().max().item() < 1e-4 * rms(alone)


def test_greedy_tokens_equal_hugging_face(small, ids):
    memory = small.compress(ids[:100])[0]
    prefix, suffix = (small.tokens_to_embeddings(torch.tensor(p)) for p in small.prompt_ids(QUESTIONS[0]))
    x, cache, expected = torch.cat((prefix, memory.slots, suffix))[None], DynamicCache(), []
    with torch.no_grad():
        for _ in range(8):
            logits = small.base_model(inputs_embeds=x, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            logits[small.eos_token_ids[0]] = float("-inf")
            expected.append(int(logits.argmax()))
            x = small.embed(torch.tensor([expected[-1:]]))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "return_ids": True}
    assert small.generate(memory, QUESTIONS[0], **options) == [expected]
    assert small.generate(memory, QUESTIONS[::-1], **options)[1] == expected


def test_two_prompts_in_bf16_return_text(small, smollm2_bf16, ids, long_text):
    icae = same_in_bf16(small, smollm2_bf16[0])
    text = icae.tokenizer.decode(ids[:100])
    assert long_text.startswith(text)
    memory = icae.compress(text)[0]
    assert memory.span_lengths == (50, 50)
    assert memory.slots.dtype == torch.bfloat16
    answers = icae.generate(memory, QUESTIONS, max_new_tokens=6, min_new_tokens=6)
    rows = icae.generate(memory, QUESTIONS, max_new_tokens=6, min_new_tokens=6, return_ids=True)
    assert answers == [icae.tokenizer.decode(r, skip_special_tokens=True) for r in rows]
    assert all(isinstance(a, str) and a for a in answers)
    assert all(len(r) == 6 and not set(r) & set(icae.eos_token_ids) for r in rows)
    assert isinstance(icae.restore(memory, max_new_tokens=3), str)


def test_the_chat_template_encloses_slots_and_prompt(fp32):
    tokenizer, ft = fp32.tokenizer, fp32.vocabulary.ft
    prefix, suffix = fp32.prompt_ids(QUESTIONS[0])
    question = tokenizer(QUESTIONS[0])["input_ids"]
    assert tokenizer.decode(prefix) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n"
    )
    assert suffix[: 1 + len(question)] == [ft, *question]
    assert tokenizer.decode(suffix[1 + len(question) :]) == "<|im_end|>\n<|im_start|>assistant\n"


def test_text_and_its_token_ids_have_the_same_memory(small, ids):
    by_text, by_ids = small.compress(small.tokenizer.decode(ids[:60]))[0], small.compress(ids[:60])[0]
    assert by_text.n_source_tokens == 60
    assert torch.equal(by_text.slots, by_ids.slots)


def test_special_ids_follow_the_base_vocabulary(fp32):
    v = fp32.vocabulary
    assert (v.n_base, v.pad, v.first_memory, v.ae, v.lm, v.ft) == (49152, 49152, 49153, 49281, 49282, 49283)
    assert fp32.eos_token_ids == (2,)
    assert fp32.max_positions == 8192
    assert fp32.config.base_model == "smollm2-135m-instruct"
