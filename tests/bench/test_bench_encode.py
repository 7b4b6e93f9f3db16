"""Parts of the encoding benchmarks: bare GEMMs, an encoder without LoRA, growth, and targets."""

import math
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("pytest_benchmark", reason="the harness needs pytest-benchmark")
pytest.importorskip("peft", reason="the baseline needs peft")

from bench.harness import compare as harness
from bench.harness import encoders, growth, models, shapes, targets
from bench.harness.gemms import BareGemms
from icae_fast.benchmark import checks
from icae_fast.benchmark.measure import rounded


@pytest.mark.parametrize("token_budget", [20, 1000])
def test_bare_gemms_are_the_products_of_the_encoder(make_icae, token_budget):
    icae, lengths = make_icae(), [13, 9, 5, 16]
    gemms = BareGemms(icae, lengths, token_budget)
    with FlopCounterMode(display=False) as counter:
        gemms()
    counts = counter.get_flop_counts()["Global"]
    assert counts.keys() == {torch.ops.aten.mm}
    shape, k, r = shapes.ModelShape.of(icae.base_model), icae.config.memory_size, icae.config.lora_rank
    assert counts[torch.ops.aten.mm] == gemms.flops == shapes.encode_gemm_flops(shape, lengths, k, r)


def test_bare_gemms_take_the_model_s_own_weights(make_icae):
    icae = make_icae()
    mlp = icae.backbone.model.layers[0].mlp
    both = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = both.chunk(2)
    weights = {weight.data_ptr() for _, weight, _ in BareGemms(icae, [13], 1000)._products}
    assert {both.data_ptr(), icae.backbone.model.layers[1].self_attn.o_proj.weight.data_ptr()} <= weights


def test_lora_s_share_of_the_work_is_that_of_its_weights():
    smollm2, lengths = shapes.MODELS["smollm2-135m"], [512] * 4
    d, q, kv = 576, 576, 192
    assert shapes.lora_flops_share(smollm2, lengths, 128, 0) == 0
    share = shapes.lora_flops_share(smollm2, lengths, 128, 128)
    assert math.isclose(share, 128 * (2 * d + q + kv) / smollm2.layer_weights(), rel_tol=0.02)


def test_encoding_without_lora_is_that_of_an_adapter_that_does_nothing(make_icae, random_ids):
    icae, spans = make_icae(), [random_ids(n, seed=n) for n in (13, 9, 16)]
    without = models.encode_without_lora(icae, spans)
    assert checks.rms_difference(torch.cat([m.slots for m in icae.compress(spans)]), without) > 1e-2
    with torch.no_grad():
        for _, _, factor, parameter in icae.adapter.named_factors():
            if factor == "B":
                parameter.zero_()
    checks.assert_same(torch.cat([m.slots for m in icae.compress(spans)]), without, torch.float32, "slots")


def test_adapter_mode_is_for_one_call():
    icae = types.SimpleNamespace(adapter_mode="auto")
    assert models.in_adapter_mode(icae, "fused", lambda: icae.adapter_mode)() == "fused"
    assert icae.adapter_mode == "auto"
    with pytest.raises(ZeroDivisionError):
        models.in_adapter_mode(icae, "merged", lambda: 1 / 0)()
    assert icae.adapter_mode == "auto"


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with models.with_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with models.with_threads(0):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_facts_of_an_encoder():
    case = shapes.ENCODE_WORKLOADS["real"][0]
    seconds = {encoders.GEMMS: [1.0, 1.0], harness.OURS: [1.5, 2.0]}
    facts = encoders.encoder_facts(case)(seconds)
    assert facts == {"time_over_gemms": {"median": 1.75, "min": 1.5, "max": 2.0, "of_minima": 1.5}}
    seconds |= {encoders.OURS_FUSED: [2.2, 2.0], encoders.WITHOUT_LORA: [2.0, 2.0]}
    facts = encoders.encoder_facts(case)(seconds)
    assert rounded(facts["lora_cost"]) == {"median": 0.05, "min": 0.0, "max": 0.1, "of_minima": 0.0}
    assert math.isclose(facts["lora_flops_share"], 0.07, abs_tol=1e-3)


def test_growth_is_the_slope_of_the_best_times():
    assert math.isclose(growth.exponent([1, 2, 4], [3.0, 6.0, 12.0]), 1.0)
    assert math.isclose(growth.exponent([1, 2, 4], [1.0, 4.0, 16.0]), 2.0)
    seconds = {1: [2.0, 1.0], 2: [2.0, 5.0]}
    peaks, slots = {1: 7_000_000, 2: 8_000_000}, {1: 1_000_000, 2: 2_000_000}
    row = growth.Growth("growth", {"case": "c"}, seconds, peaks, slots, {}).row(None)
    assert math.isclose(row["exponent"], 1.0)
    assert row["rounds"] == 2
    assert row["points"][1] == {
        "spans": 2, "seconds": {"median": 3.5, "min": 2.0}, "peak_mb": 8.0, "slots_mb": 2.0, "working_mb": 6.0,
    }  # fmt: skip


def test_targets_are_met_or_missed():
    def ratios(value):
        return {"median": value, "min": value, "max": value, "of_minima": value}

    encode = {
        "case": "smollm2-135m-bf16-4x512", "time_over_gemms": ratios(1.3), "lora_cost": ratios(0.05),
        "lora_flops_share": 0.07, "speedup_over": {"baseline": ratios(2.3), "merged compiled": ratios(1.6)},
    }  # fmt: skip
    other = {"case": "llama-1b-bf16-1x512", "time_over_gemms": ratios(9.0), "speedup_over": {"baseline": ratios(1.0)}}
    attention = {"rows_by_tokens": "4x640", "speedup_over": {"sdpa": ratios(9.0), "sdpa expanded": ratios(5.0)}}
    points = [{"spans": 1, "working_mb": 10.0}, {"spans": 2, "working_mb": 10.0}]
    rows = [encode, other, attention, {"exponent": 1.02, "points": points}, {"case": "a row of another suite"}]
    facts = {"cpu": "AMD EPYC", "threads": 2, "cpu_features": ["avx512f"]}

    def verdicts(facts):
        lines = targets.render(facts, rows).splitlines()
        assert "…" not in "".join(lines)
        return [next((v for v in ("met", "missed") if v in line.split("┃")[-1]), "") for line in lines if "│" in line]

    # The baseline, compiled, GEMMs and LoRA; the other model's two; attention; the exponent and memory.
    assert verdicts(facts) == ["met", "met", "missed", "met", "", "", "met", "met", ""]
    with_amx = verdicts(facts | {"cpu_features": ["amx_bf16"]})
    assert with_amx == ["missed", "met", "met", "met", "", "", "missed", "met", ""]
    assert targets.render(facts, [rows[-1]]) == ""
