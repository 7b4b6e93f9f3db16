"""Answering prompts from a memory: the reference's loop, which reads the slots for every prompt, and icae_fast."""

import pytest
import torch

from bench.checks import assert_greedy
from bench.harness import OURS, Work
from bench.models import SEED, documents_for, models_for

PROMPT_TOKENS = 16


@pytest.mark.parametrize("prompts", [1, 4], ids=["1-prompt", "4-prompts"])
def test_answer(compare, one_document, prompts):
    case = one_document
    models = models_for(case)
    icae, baseline = models.icae, models.baseline
    memory = icae.compress(documents_for(case))[0]
    generator = torch.Generator().manual_seed(SEED + 1)
    questions = list(torch.randint(case.shape.vocabulary, (prompts, PROMPT_TOKENS), generator=generator))
    sides = [icae.prompt_ids(q) for q in questions]
    limits = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}

    def ask_baseline():
        slots = memory.slots
        return [baseline.generate(slots, s, p, eos_ids=icae.eos_token_ids, **limits) for p, s in sides]

    def ask_ours():
        icae.clear_kv()  # first questions: the slots are read once for all of them
        return icae.generate(memory, questions, return_ids=True, **limits)

    def check(results):
        for answers in results.values():
            for (prefix, suffix), answer in zip(sides, answers, strict=True):
                assert len(answer) == case.new_tokens
                assert_greedy(baseline, memory.slots, prefix, suffix, answer, icae.eos_token_ids, case.torch_dtype)

    element = torch.empty((), dtype=case.torch_dtype).element_size()
    compare(
        {"baseline": ask_baseline, OURS: ask_ours},
        check,
        # All prompts decode in one batch at best, so the weights are read once for each step.
        Work("read", bytes=case.new_tokens * case.shape.decode_weights() * element, tokens=prompts * case.new_tokens),
        ops=("lora_qkv_rope", "varlen_attention"),
        case=case.name,
        prompts=prompts,
    )
