"""The golden cases: slots, logits, loss, gradients and greedy tokens equal the public reference's in fp32."""

import pytest
import torch

from helpers import golden
from icae_fast import ICAE
from icae_fast.ops._declare import interpreted


# Triton's interpreter would take five minutes for everything. Merged weights and a batch use no further kernels, so
# they are left out there.
@pytest.fixture(params=["fused"] if interpreted() else ["fused", "merged"])
def icae(request):
    loaded = ICAE.from_reference_checkpoint(golden.reference_checkpoint_path(), golden.load_base())
    loaded.adapter_mode = request.param
    return loaded


def pad(rows, value):
    return torch.nn.utils.rnn.pad_sequence([r[0] for r in rows], batch_first=True, padding_value=value)


def test_sizes_and_ids_follow_from_the_tensors(icae):
    s = golden.SETTINGS
    assert (icae.config.memory_size, icae.config.lora_rank) == (s["memory_size"], s["lora_r"])
    v = icae.vocabulary
    assert (v.pad, v.first_memory, v.ae, v.lm, v.ft) == (
        s["pad_token_id"], s["first_memory_id"], s["ae_token_id"], s["lm_token_id"], s["ft_token_id"],
    )  # fmt: skip


@pytest.mark.parametrize("name", golden.CASES)
def test_each_golden_case_by_itself(icae, name):
    case = golden.case(name)
    memory = icae.compress([case["input_ids"][0]])[0]
    torch.testing.assert_close(memory.slots, case["slots"], rtol=1e-5, atol=1e-5)
    out = icae(case["input_ids"], case["prompt_answer_ids"], case["labels"])
    torch.testing.assert_close(out["logits"], case["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss"], case["loss"][0], rtol=1e-5, atol=1e-5)
    out["loss"].backward()
    checked = 0
    for key, parameter in icae.reference_named_parameters():
        expected = case.get(f"grad.{key.removesuffix('.weight') if key.startswith('memory') else key}")
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
            checked += 1
    assert checked == 9
    assert icae.restore(memory, max_new_tokens=24, return_ids=True) == case["greedy"].tolist()


@pytest.mark.skipif(interpreted(), reason="takes a minute in Triton's interpreter and runs no further kernels")
def test_all_golden_cases_in_one_batch(icae):
    cases = [golden.case(name) for name in golden.CASES]
    memories = icae.compress([c["input_ids"][0] for c in cases])
    for memory, c in zip(memories, cases, strict=True):
        torch.testing.assert_close(memory.slots, c["slots"], rtol=1e-5, atol=1e-5)
        assert icae.restore(memory, max_new_tokens=24, return_ids=True) == c["greedy"].tolist()
    out = icae(
        pad([c["input_ids"] for c in cases], icae.vocabulary.pad),
        pad([c["prompt_answer_ids"] for c in cases], icae.vocabulary.pad),
        pad([c["labels"] for c in cases], -100),
    )
    counts = [(c["labels"][:, 1:] != -100).sum() for c in cases]
    expected = sum(c["loss"][0] * n for c, n in zip(cases, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-5, atol=1e-5)
    for row, c in zip(out["logits"], cases, strict=True):
        n = c["logits"].shape[1]
        torch.testing.assert_close(row[:n], c["logits"][0], rtol=1e-5, atol=1e-5)
        assert not row[n:].any()
    out["loss"].backward()
    total = {}
    for c, n in zip(cases, counts, strict=True):
        for key, grad in c.items():
            if key.startswith("grad."):
                total[key] = total.get(key, 0) + grad * n / sum(counts)
    for key, parameter in icae.reference_named_parameters():
        expected = total.get(f"grad.{key.removesuffix('.weight') if key.startswith('memory') else key}")
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
