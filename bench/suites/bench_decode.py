"""Decode one long answer from a memory whose keys and values exist: icae_fast, transformers' `generate`, a plain read.

`make bench-decode` runs this and `bench_decode_*.py` and writes their rows into one file. Targets are in
`bench.harness.targets`; `bench.rivals.llama_cpp` adds a row for llama.cpp.
"""

from bench.harness import decoders
from bench.harness.compare import OURS
from bench.harness.decoders import GENERATE, WEIGHTS_READ, SplitTimer
from bench.harness.models import documents_for, models_for
from icae_fast.benchmark.measure import FirstToken

ROUNDS = 5  # a round takes a quarter of a minute


def test_decode(compare, decode_case):
    case = decode_case
    models, limits = models_for(case), decoders.answer_limits(case)
    icae = models.icae
    _ = models.baseline  # built here, so that its weights do not count as peak memory
    memory, prompts = icae.compress(documents_for(case))[0], decoders.prompts_for(case)
    icae.clear_kv()
    icae.generate(memory, prompts, max_new_tokens=1, return_ids=True)  # computes the slots' keys and values
    pad = icae.eos_token_ids[0]

    def ours():
        clock = FirstToken()
        return icae.generate(memory, prompts, return_ids=True, streamer=clock, **limits), clock.at

    def generate():
        # The cache is a copy of the kept keys and values; it takes milliseconds of the seconds measured.
        inputs = icae.generation_inputs(memory, prompts, case.new_tokens)
        clock = FirstToken(skip=1)
        ids = icae.base_model.generate(
            **inputs, min_new_tokens=case.new_tokens, do_sample=False, num_beams=1, streamer=clock, pad_token_id=pad
        )
        return ids.tolist(), clock.at

    timers = {GENERATE: SplitTimer(generate), OURS: SplitTimer(ours)}
    calls = {GENERATE: timers[GENERATE], WEIGHTS_READ: decoders.weight_reader(case), OURS: timers[OURS]}

    def check(results):
        for name in (GENERATE, OURS):
            decoders.assert_answers(models, case, memory.slots, prompts, results[name])

    def derive(seconds):
        rounds, steps = len(seconds[OURS]), case.new_tokens - 1
        after = {name: timers[name].after[-rounds:] for name in (GENERATE, OURS)}
        n_bytes = decoders.weight_bytes(case)
        return decoders.step_facts(steps, after) | decoders.bandwidth_facts(
            n_bytes, steps, after[OURS], seconds[WEIGHTS_READ]
        )

    compare(
        calls,
        check,
        decoders.decode_work(case),
        ("decode_step", "lora_qkv_rope", "shared_prefix_attention"),
        {WEIGHTS_READ: decoders.reading_work(case)},
        ROUNDS,
        derive,
        case=case.name,
        new_tokens=case.new_tokens,
    )
