"""Greedy tokens equal those of the baseline, which computes like the reference, one prompt at a time."""

import pytest
import torch

from icae_fast import ICAE, ICAEConfig

pytest.importorskip("peft", reason="the baseline needs PEFT, which comes with the extra `bench`")

from icae_fast.benchmark.baseline import BaselineICAE

pytestmark = pytest.mark.usefixtures("one_thread")

N_PROMPTS, N_TOKENS = 200, 8


def baseline_answer(baseline, icae, memory, prompt, n):
    prefix, suffix = icae.prompt_ids(prompt)
    return baseline.generate(memory.slots, suffix, prefix, n, eos_ids=icae.eos_token_ids)


def test_greedy_tokens_of_200_prompts_equal_the_baseline_in_fp32(make_icae, random_ids):
    """Batches of 50 prompts read ten memories, and rows leave at their end-of-sequence id."""
    icae = make_icae(seed=5)
    baseline = BaselineICAE.from_icae(icae)
    memories = icae.compress([random_ids(n, seed=n) for n in range(3, 63, 6)])
    lengths = torch.randint(1, 20, (N_PROMPTS,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [random_ids(n, seed=100 + i) for i, n in enumerate(lengths)]
    asked = [memories[i % 10] for i in range(N_PROMPTS)]
    free = icae.generate(asked, prompts, N_TOKENS, return_ids=True)
    # The most frequent token becomes the end-of-sequence id, so that many rows leave their batch early.
    icae.base_model.generation_config.eos_token_id = max(range(96), key=[i for row in free for i in row].count)
    answers = []
    for start in range(0, N_PROMPTS, 50):
        part = slice(start, start + 50)
        answers += icae.answer(asked[part], prompts[part], N_TOKENS)
    assert 20 < sum(a.finish_reason == "eos" for a in answers) < N_PROMPTS
    for i, answer in enumerate(answers):
        expected = baseline_answer(baseline, icae, asked[i], prompts[i], N_TOKENS)
        ids = answer.ids[:-1] if answer.finish_reason == "eos" else answer.ids
        assert ids == expected, f"prompt {i} of {len(prompts[i])} tokens"


def test_differing_greedy_tokens_in_bf16_are_near_ties(smollm2, smollm2_bf16, long_text):
    """At the first differing token, the baseline's logits of both tokens differ by no more than bf16 rounding."""
    tokenizer = smollm2[1]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        exact = ICAE.from_base(smollm2[0], ICAEConfig(memory_size=16, lora_rank=8), tokenizer).eval()
    icae = ICAE.from_base(smollm2_bf16[0], exact.config, tokenizer).eval()
    icae.adapter.load_state_dict(exact.adapter.state_dict())
    icae.memory_token_embed.load_state_dict(exact.memory_token_embed.state_dict())
    baseline, fp32 = BaselineICAE.from_icae(icae), BaselineICAE.from_icae(exact)
    memory = icae.compress(tokenizer(long_text)["input_ids"][:60])[0]
    words = long_text.split()
    prompts = [" ".join(words[i : i + 2 + i % 5]) for i in range(0, 60, 10)]
    n = 12
    for prompt, answer in zip(prompts, icae.answer(memory, prompts, n), strict=True):
        expected = baseline_answer(baseline, icae, memory, prompt, n)
        ids = answer.ids[:-1] if answer.finish_reason == "eos" else answer.ids
        pairs = zip([*ids, *icae.eos_token_ids], [*expected, *icae.eos_token_ids], strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if place is None:
            assert ids == expected
            continue
        prefix, suffix = icae.prompt_ids(prompt)
        begun = [*expected[:place], 0]  # the last id is a placeholder for the token in question
        rounded, true = (b.answer_logits(memory.slots, suffix, begun, prefix)[-1] for b in (baseline, fp32))
        ours, theirs = ([*row, *icae.eos_token_ids][place] for row in (ids, expected))
        gap = (rounded.max() - rounded[ours]).item()
        rounding = (rounded - true).abs().max().item()
        # Each of the two logits may be off by `rounding`.
        assert gap <= 2 * rounding, (
            f"{prompt!r}: token {place} is {ours}, the baseline's is {theirs} with a logit {gap:.3f} higher, but bf16 "
            f"moves each of the baseline's logits by at most {rounding:.3f}"
        )
