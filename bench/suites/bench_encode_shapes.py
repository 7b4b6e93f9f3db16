"""Compress with a larger model, and with longer and shorter spans, on one thread and on two.

Rates are fractions of the bound of all threads, even for rows on one thread; bare GEMMs run on the row's threads.
"""

import torch

from bench.harness import encoders
from bench.harness.compare import OURS
from bench.harness.models import documents_for, models_for, with_threads

# Calls with more operations may take half a minute and are timed once.
LONG_FLOPS = 2e12


def test_compress_shape(compare, shape_case):
    case = shape_case
    models, documents = models_for(case), documents_for(case)
    icae, baseline = models.icae, models.baseline  # built here, so that weights do not count as peak memory
    spans = torch.cat(documents).split(case.span_lengths)
    work = encoders.encoder_work(case)
    calls = {
        encoders.BASELINE: lambda: torch.cat([baseline.compress(d) for d in documents]),
        encoders.GEMMS: models.gemms(spans),
        OURS: lambda: icae.compress(documents),
    }
    if not case.shape.bundled:  # `bench_encode.py` measures SmolLM2 with merged weights
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
