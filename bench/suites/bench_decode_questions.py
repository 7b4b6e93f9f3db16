"""Many questions about one document, compressing included: icae_fast in one call, and the baseline in two ways.

The baseline compresses the document for every question ("by prompt"), or once ("one by one").
"""

import time

from bench.harness import decoders
from bench.harness.compare import OURS, Outcome
from bench.harness.decoders import BY_PROMPT, MEASURED_PROMPTS, ONE_BY_ONE, SplitTimer
from bench.harness.models import documents_for, models_for
from icae_fast import backend_of
from icae_fast.benchmark.checks import assert_same

OPS = ("lora_qkv_rope", "varlen_attention", "shared_prefix_attention", "decode_step")
ROUNDS = 3  # a round takes a minute


def test_questions(compare, question_case):
    case = question_case
    models, limits = models_for(case), decoders.answer_limits(case)
    icae, baseline, (document,) = models.icae, models.baseline, documents_for(case)
    prompts = decoders.prompts_for(case)
    sides, few = [icae.prompt_ids(p) for p in prompts], range(MEASURED_PROMPTS)
    icae.compress(document[:8])  # packs the weights, so that they do not count as peak memory

    def ask_baseline(slots, i):
        prefix, suffix = sides[i]
        return baseline.generate(slots, suffix, prefix, eos_ids=icae.eos_token_ids, **limits)

    def by_prompt():
        answers = []
        for i in few:
            slots = baseline.compress(document)
            answers.append(ask_baseline(slots, i))
        return slots, answers

    def one_by_one():
        slots = baseline.compress(document)
        compressed = time.perf_counter()
        return (slots, [ask_baseline(slots, i) for i in few]), compressed

    def ours():
        icae.clear_kv()
        memory = icae.compress(document)[0]
        return memory.slots, icae.generate(memory, prompts, return_ids=True, **limits)

    once = SplitTimer(one_by_one)
    calls = {BY_PROMPT: by_prompt, ONE_BY_ONE: once, OURS: ours}

    def check(results):
        expected, _ = results[ONE_BY_ONE]
        for name, (slots, answers) in results.items():
            assert_same(slots, expected, case.torch_dtype, f"slots of {name}")
            decoders.assert_answers(models, case, slots, prompts if name == OURS else prompts[: len(few)], answers)

    with decoders.recorded_kv_bytes() as held:
        seconds, peaks = compare.measure(calls, check, rounds=ROUNDS)
    assert len(set(held)) == 1, f"one call's sessions held {held} bytes of keys and values"
    rounds = len(seconds[OURS])
    scaled, words = decoders.scaled_times(
        case.prompts, len(few), seconds[BY_PROMPT], once.before[-rounds:], once.after[-rounds:]
    )
    own_tokens = sum(len(suffix) + case.new_tokens for _, suffix in sides)
    facts = {
        "case": case.name,
        "prompts": case.prompts,
        "new_tokens": case.new_tokens,
        "prompts_measured": {name: len(prompts) if name == OURS else len(few) for name in calls},
        "scaled": words,
        **decoders.kv_facts(case, held[0], own_tokens),
    }
    backends = {op: backend_of(op, icae.device) for op in OPS}
    compare.report(
        Outcome(compare.benchmark.name, facts, seconds | scaled, peaks, decoders.decode_work(case), backends)
    )
