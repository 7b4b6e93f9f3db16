"""Compress documents with icae_fast, the baseline, merged weights and bare GEMMs; and the growth of time with spans.

`make bench-encode` runs this and `bench_encode_*.py` and writes their rows into one file. Targets are in
`bench.harness.targets`.
"""

import torch

from bench.harness import encoders
from bench.harness.compare import OURS
from bench.harness.growth import Growth
from bench.harness.models import documents_for, encode_without_lora, in_adapter_mode, models_for
from icae_fast import backend_of

OPS = ("lora_qkv_rope", "varlen_attention")
# A round of all providers takes five seconds per document, and a round of growth a minute.
DOCUMENTS_IN_ALL_ROUNDS, LEAST_ROUNDS, GROWTH_ROUNDS = 16, 3, 2


def test_compress(compare, encode_case):
    case = encode_case
    models, documents = models_for(case), documents_for(case)
    # Built here, so that their weights do not count as peak memory.
    icae, baseline, merged, compiled, frozen = (
        models.icae, models.baseline, models.merged, models.compiled, models.frozen
    )  # fmt: skip
    spans = torch.cat(documents).split(case.span_lengths)
    gemms = models.gemms(spans)
    for encoder in (compiled, frozen):
        encoder.compress(spans)  # compiles

    def ours():
        return icae.compress(documents)

    compare(
        {
            encoders.BASELINE: lambda: torch.cat([baseline.compress(d) for d in documents]),
            encoders.MERGED: lambda: merged.compress(spans),
            encoders.COMPILED: lambda: compiled.compress(spans),
            encoders.FROZEN: lambda: frozen.compress(spans),
            encoders.GEMMS: gemms,
            encoders.WITHOUT_LORA: lambda: encode_without_lora(icae, spans),
            encoders.OURS_FUSED: in_adapter_mode(icae, "fused", ours),
            encoders.OURS_MERGED: in_adapter_mode(icae, "merged", ours),
            OURS: ours,
        },
        encoders.encoder_check(case),
        encoders.encoder_work(case),
        OPS,
        encoders.lesser_work(case),
        max(LEAST_ROUNDS, DOCUMENTS_IN_ALL_ROUNDS // case.documents),
        encoders.encoder_facts(case),
        case=case.name,
    )


def test_growth(compare, growing):
    cases = {str(case.documents): case for case in growing}
    largest = growing[-1]
    icae, documents = models_for(largest).icae, documents_for(largest)
    slots = {}

    def check(results):
        slots.update({name: sum(m.slots.nbytes for m in memories) for name, memories in results.items()})
        encoders.assert_same_beginnings(results, largest.torch_dtype)

    icae.compress(documents[:1])  # packs the weights, so that they do not count as peak memory
    seconds, peaks = compare.measure(
        {name: lambda n=case.documents: icae.compress(documents[:n]) for name, case in cases.items()},
        check,
        str(largest.documents),
        GROWTH_ROUNDS,
    )

    def by_spans(values):
        return {case.documents: values[name] for name, case in cases.items()}

    facts, backends = {"case": largest.name}, {op: backend_of(op, icae.device) for op in OPS}
    compare.report(Growth(compare.benchmark.name, facts, by_spans(seconds), by_spans(peaks), by_spans(slots), backends))
