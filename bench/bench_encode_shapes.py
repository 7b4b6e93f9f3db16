"""Compressing with a larger model, and spans longer and shorter than usual, on one thread and on two.

Rates are fractions of what all threads reach, whatever a row runs on; bare GEMMs have a row's own threads.
"""

import torch

from bench import encoders
from bench.harness import OURS
from bench.models import documents_for, models_for, with_threads

ROUNDS = 2  # a call takes up to half a minute


def test_compress_shape(compare, shape_case):
    case = shape_case
    models, documents = models_for(case), documents_for(case)
    icae, baseline, merged = models.icae, models.baseline, models.merged  # made here: their weights are no peak
    spans = torch.cat(documents).split(case.span_lengths)
    gemms = models.gemms(spans)
    icae.compress(documents[0][:8])  # packs the weights

    with with_threads(case.threads):
        compare(
            {
                encoders.BASELINE: lambda: torch.cat([baseline.compress(d) for d in documents]),
                encoders.MERGED: lambda: merged.compress(spans),
                encoders.GEMMS: gemms,
                OURS: lambda: icae.compress(documents),
            },
            encoders.encoder_check(case),
            encoders.encoder_work(case),
            ("lora_qkv_rope", "varlen_attention"),
            ROUNDS,
            encoders.encoder_facts(case),
            case=case.name,
            threads=torch.get_num_threads(),
        )
