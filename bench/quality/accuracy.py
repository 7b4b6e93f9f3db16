"""Distance of bf16 slots from the baseline's: `python -m bench.quality.accuracy examples/harrow_point.txt`.

Two implementations that round differently cannot agree better than each agrees with exact arithmetic. The distance is
therefore reported in units of the baseline's bf16 error:

    |ours_bf16 - baseline_bf16| / |baseline_bf16 - baseline_fp32|    by RMS over all slots

Writes docs/results/accuracy-MACHINE.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench.harness.models import build_icae
from bench.quality.command import publish, read_text
from icae_fast import ICAE, ICAEConfig
from icae_fast.adapter.mode import AdapterMode
from icae_fast.benchmark.baseline import BaselineICAE
from icae_fast.benchmark.measure import rounded
from icae_fast.io.bundled import load_smollm2

TOKENS = (700, 1100)
ADAPTER_MODES: tuple[AdapterMode, ...] = ("fused", "merged")
LORA_B_STD = (0.0, 0.02, 0.2)  # standard deviation of the LoRA's up-projections; 0 is a new adapter


def with_adapter(dtype: torch.dtype, std: float) -> ICAE:
    """Return SmolLM2 in `dtype` with a random adapter at the paper's sizes, the same for every dtype."""
    icae = build_icae(load_smollm2(torch.float32)[0], ICAEConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, _, factor, parameter in icae.adapter.named_factors():
            if factor == "B":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    icae.base_model.to(dtype)
    return icae


def rms(t: torch.Tensor) -> float:
    """Return the root mean square."""
    return t.float().pow(2).mean().sqrt().item()


@torch.no_grad()
def compare(ids: torch.Tensor, std: float) -> list[dict[str, Any]]:
    """Return the distances for one context in each adapter mode, as JSON values.

    Args:
        ids: ids of the context, (L,).
        std: standard deviation of the LoRA's B factors.
    """
    exact, narrow = with_adapter(torch.float32, std), with_adapter(torch.bfloat16, std)
    truth, rounded_truth = (BaselineICAE.from_icae(i).compress(ids[None]).float() for i in (exact, narrow))
    error = rms(rounded_truth - truth)
    rows = []
    for mode in ADAPTER_MODES:
        exact.adapter_mode = narrow.adapter_mode = mode
        ours32, ours16 = (i.compress(ids)[0].slots.float() for i in (exact, narrow))
        rows.append(
            {
                "tokens": len(ids),
                "lora_b_std": std,
                "adapter_mode": mode,
                "fp32_rms_difference": rms(ours32 - truth) / rms(truth),
                "baseline_bf16_error": error / rms(truth),
                "bf16_distance": rms(ours16 - rounded_truth) / error,
                "bf16_error_of_ours": rms(ours16 - truth) / error,
            }
        )
    return rows


def main(arguments: Sequence[str]) -> None:
    """Compare on the text file named on the command line, and write the results."""
    text = read_text("bench.quality.accuracy", __doc__, arguments)
    ids = torch.tensor(load_smollm2()[1](text)["input_ids"])
    publish("accuracy", [rounded(row) for n in TOKENS for std in LORA_B_STD for row in compare(ids[:n], std)])


if __name__ == "__main__":
    main(sys.argv[1:])
