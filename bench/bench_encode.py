"""Compressing documents: the reference's way, merged weights in eager Hugging Face, and icae_fast."""

import torch

from bench.checks import assert_same
from bench.harness import GEMM_BOUND, OURS, Work
from bench.models import documents_for, models_for
from bench.shapes import encode_flops


def test_compress(compare, case):
    models, documents = models_for(case), documents_for(case)
    icae, baseline, merged = models.icae, models.baseline, models.merged  # made here: their weights are no peak
    spans = torch.cat(documents).split(case.span_lengths)

    def check(results):
        slots = results["baseline"]
        assert_same(torch.cat([m.slots for m in results[OURS]]), slots, case.torch_dtype, "slots")
        assert_same(results["merged"], slots, case.torch_dtype, "slots with merged weights")

    compare(
        {
            "baseline": lambda: torch.cat([baseline.compress(d) for d in documents]),
            "merged": lambda: merged.compress(spans),
            OURS: lambda: icae.compress(documents),
        },
        check,
        Work(
            GEMM_BOUND[case.torch_dtype],
            flops=encode_flops(case.shape, case.span_lengths, case.memory_size, case.rank),
            tokens=case.documents * case.tokens,
        ),
        ops=("lora_qkv_rope", "varlen_attention"),
        case=case.name,
    )
