"""First token of an answer about a document whose memory is stored; the baseline must compress the document."""

from pathlib import Path

from bench.harness import decoders
from bench.harness.compare import OURS, Work
from bench.harness.decoders import BASELINE, KV_TIER
from bench.harness.models import documents_for, models_for
from icae_fast import ICAE, Memory, MemoryStore
from icae_fast.benchmark.checks import assert_same
from icae_fast.benchmark.measure import speedup

KEY = "document"
ROUNDS = 3  # a round takes a quarter of a minute


def put(folder: Path, icae: ICAE, memory: Memory) -> None:
    """Store a memory with its keys and values."""
    with MemoryStore(folder, icae) as store:
        store.put(KEY, memory, kv=True)


def get(folder: Path, icae: ICAE, kv: bool) -> Memory:
    """Open the store again and load the memory into a model without cached keys and values."""
    icae.clear_kv()
    with MemoryStore(folder, icae) as store:
        return store.get(KEY, kv=kv)


def test_first_token(compare, first_token_case, tmp_path):
    case = first_token_case
    models, limits = models_for(case), decoders.answer_limits(case)
    icae, baseline, (document,) = models.icae, models.baseline, documents_for(case)
    prompts = decoders.prompts_for(case)
    ((prefix, suffix),) = [icae.prompt_ids(p) for p in prompts]
    put(tmp_path, icae, icae.compress(document)[0])

    def compress():
        slots = baseline.compress(document)
        return slots, [baseline.generate(slots, suffix, prefix, eos_ids=icae.eos_token_ids, **limits)], 0

    def from_store(kv):
        memory = get(tmp_path, icae, kv)
        kept = icae.slot_kv.nbytes
        return memory.slots, icae.generate(memory, prompts, return_ids=True, **limits), kept

    calls = {BASELINE: compress, OURS: lambda: from_store(False), KV_TIER: lambda: from_store(True)}

    def check(results):
        expected = results[BASELINE][0]
        for name, (slots, answers, kept) in results.items():
            assert_same(slots, expected, case.torch_dtype, f"slots of {name}")
            decoders.assert_answers(models, case, slots, prompts, answers)
            assert (kept > 0) == (name == KV_TIER), f"{name} found {kept} bytes of keys and values"

    def derive(seconds):
        return {"first_token_speedup": {n: speedup(t, seconds[BASELINE]) for n, t in seconds.items() if n != BASELINE}}

    compare(
        calls,
        check,
        Work("read", tokens=1),
        ("lora_qkv_rope", "varlen_attention", "shared_prefix_attention"),
        rounds=ROUNDS,
        derive=derive,
        case=case.name,
        slots_read=len(case.span_lengths) * case.memory_size,
    )
