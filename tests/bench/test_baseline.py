"""The benchmarks' baseline computes the same as the public reference and as `icae_fast.ICAE`."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from helpers import golden

pytest.importorskip("peft", reason="the baseline needs peft")

from helpers.tolerances import CLOSE_FP32
from icae_fast.benchmark.baseline import BaselineICAE


def golden_baseline(two_copies=False):
    s = golden.SETTINGS
    baseline = BaselineICAE(
        golden.load_base(), s["memory_size"], s["mean_compression_rate"], s["lora_r"], s["lora_alpha"], 0.0, two_copies
    )
    baseline.load_reference_tensors(load_file(golden.reference_checkpoint_path()))
    return baseline.eval()


@pytest.mark.parametrize("name", golden.CASES)
def test_golden_slots_and_greedy_tokens(name):
    baseline, case = golden_baseline(), golden.case(name)
    slots = baseline.compress(case["input_ids"])
    torch.testing.assert_close(slots, case["slots"], rtol=1e-5, atol=1e-5)
    eos = golden.SETTINGS["base"]["eos_token_id"]
    produced = baseline.generate(slots, [baseline.ae_token_id], max_new_tokens=24, eos_ids=[eos])
    expected = [t for t in case["greedy"].tolist() if t != eos]
    assert produced == expected
    assert baseline.answer(case["input_ids"], [baseline.ae_token_id], max_new_tokens=24, eos_ids=[eos]) == expected
    if produced:
        assert baseline.answer_logits(slots, [baseline.ae_token_id], produced).argmax(-1).tolist() == expected


@pytest.mark.parametrize("two_copies", [False, True])
@pytest.mark.parametrize("name", golden.CASES)
def test_golden_logits_loss_and_gradients(name, two_copies):
    baseline, case = golden_baseline(two_copies), golden.case(name)
    baseline.train(two_copies)  # checkpointing in the second copy, no dropout either way
    out = baseline(case["input_ids"], case["prompt_answer_ids"], case["labels"])
    torch.testing.assert_close(out["logits"][..., : baseline.n_base], case["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss"], case["loss"][0], rtol=1e-5, atol=1e-5)
    out["loss"].backward()
    checked = 0
    for key, parameter in baseline.named_parameters():
        expected = case.get(f"grad.{key.removesuffix('.weight') if key.startswith('memory') else key}")
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
            checked += 1
    assert checked == 9


def test_wrong_tensors_are_refused():
    baseline = golden_baseline()
    tensors = load_file(golden.reference_checkpoint_path())
    with pytest.raises(KeyError, match="memory_token_embed"):
        baseline.load_reference_tensors({k: v for k, v in tensors.items() if "memory" not in k})
    with pytest.raises(ValueError, match="memory_token_embed"):
        baseline.load_reference_tensors(tensors | {"memory_token_embed.weight": torch.zeros(1)})


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "qwen3"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"memory_positions": "spread", "slot_scale": "embedding_norm"},
        {"sink_token": "bos"},
        {"memory_positions": "spread", "sink_token": "bos"},
    ],
    ids=["reference", "spread-scaled", "bos", "spread-bos"],
)
def test_slots_and_answers_equal_those_of_icae_fast(make_icae, random_ids, kind, config):
    icae = make_icae(kind, **config)
    before = copy.deepcopy(icae.base_model.state_dict())
    baseline = BaselineICAE.from_icae(icae)
    rows = [random_ids(n, seed=n) for n in (1, 15, 16, 37)]
    for row, memory in zip(rows, icae.compress(rows), strict=True):
        slots = baseline.compress(row)
        torch.testing.assert_close(slots, memory.slots, **CLOSE_FP32)
        prefix, suffix = icae.prompt_ids(random_ids(3))
        limits = {"max_new_tokens": 6, "min_new_tokens": 6}
        expected = icae.generate(memory, random_ids(3), return_ids=True, **limits)[0]
        assert baseline.generate(slots, suffix, prefix, eos_ids=icae.eos_token_ids, **limits) == expected
    assert baseline.span_lengths(37) == list(icae.compress(rows[-1:])[0].span_lengths)
    after = icae.base_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_v1_batches_equal_rows_and_pollutes_unequal_ones(make_icae, random_ids):
    icae = make_icae()
    baseline = BaselineICAE.from_icae(icae)
    rows = [random_ids(13, seed=s) for s in range(3)]
    for slots, memory in zip(baseline.compress_batch(rows), icae.compress(rows), strict=True):
        torch.testing.assert_close(slots, memory.slots, rtol=1e-5, atol=1e-5)
    rows[1] = rows[1][:7]
    batch = baseline.compress_batch(rows)
    assert torch.allclose(batch[0], icae.compress(rows)[0].slots, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(batch[1], icae.compress(rows)[1].slots, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="17 tokens"):
        baseline.compress_batch([random_ids(17)])
