"""Compressing with a larger model, and spans longer and shorter than usual, on one thread and on two.

Rates are fractions of what all threads reach, whatever a row runs on; bare GEMMs have a row's own threads.
"""

import torch

from bench.harness import encoders
from bench.harness.compare import OURS
from bench.harness.models import documents_for, models_for, with_threads

# A call may take half a minute: such are timed once.
LONG_FLOPS = 2e12


def test_compress_shape(compare, shape_case):
    case = shape_case
    models, documents = models_for(case), documents_for(case)
    icae, baseline = models.icae, models.baseline  # made here: their weights are no peak
    spans = torch.cat(documents).split(case.span_lengths)
    work = encoders.encoder_work(case)
    calls = {
        encoders.BASELINE: lambda: torch.cat([baseline.compress(d) for d in documents]),
        encoders.GEMMS: models.gemms(spans),
        OURS: lambda: icae.compress(documents),
    }
    if not case.shape.embedded:  # of SmolLM2 `bench_encode.py` has it
        merged = models.merged
        calls[encoders.MERGED] = lambda: merged.compress(spans)
    icae.compress(documents[0][:8])  # packs the weights

    with with_threads(case.threads):
        compare(
            calls,
            encoders.encoder_check(case),
            work,
            ("lora_qkv_rope", "varlen_attention"),
            {encoders.GEMMS: encoders.lesser_work(case)[encoders.GEMMS]},
            1 if work.flops > LONG_FLOPS else 2,
            encoders.encoder_facts(case),
            case=case.name,
            threads=torch.get_num_threads(),
        )
