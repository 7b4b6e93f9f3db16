"""Training samples have the reference's layout and can be trained on."""

import random

import pytest
import torch

from helpers import golden
from icae_fast import ICAE
from icae_fast.errors import InvalidInputError
from icae_fast.training.methods.objectives import (
    autoencoding_sample,
    continuation_sample,
    instruction_sample,
    pad_samples,
    pretraining_sample,
)

MEMORY, AE, LM, FT, EOS = 97, 105, 106, 107, 2


@pytest.fixture(scope="module")
def icae():
    return ICAE.from_reference_checkpoint(golden.reference_checkpoint_path(), golden.load_base())


@pytest.mark.parametrize("name", golden.CASES)
def test_autoencoding_is_the_golden_layout(icae, name):
    case = golden.case(name)
    sample = autoencoding_sample(icae, case["input_ids"][0].tolist())
    assert sample.prompt_answer_ids == case["prompt_answer_ids"][0].tolist()
    assert sample.labels == case["labels"][0].tolist()


def test_continuation_leaves_the_first_tokens_unscored(icae):
    context, rest = list(range(10, 43)), list(range(20, 40))
    sample = continuation_sample(icae, context, rest, lm_token=True)
    assert sample.prompt_answer_ids == [MEMORY] * 16 + [LM, *rest]
    assert sample.labels == [-100] * 25 + rest[8:]
    assert continuation_sample(icae, context, rest).prompt_answer_ids == [MEMORY] * 16 + rest


def test_instruction_without_a_template(icae):
    sample = instruction_sample(icae, [5, 6, 7], [30, 31], [40, 41])
    assert sample.prompt_answer_ids == [MEMORY] * 8 + [FT, 30, 31, 40, 41, EOS]
    assert sample.labels == [-100] * 11 + [40, 41, EOS]


def test_pretraining_mixes_by_the_ratio(icae):
    ids = [3 + i % 90 for i in range(400)]
    rng = random.Random(0)
    samples = [pretraining_sample(icae, ids, 100, 0.4, rng) for _ in range(300)]
    lm = [s for s in samples if AE not in s.prompt_answer_ids]
    # An excerpt may end where too little text follows: with 400 tokens, in 1 of 5 draws.
    assert 0.2 < len(lm) / len(samples) < 0.45
    assert all(len(s.input_ids) == 100 for s in samples)
    assert all(64 < len(s.prompt_answer_ids) - 32 <= 100 for s in lm)
    assert all(AE in pretraining_sample(icae, ids[:50], 100, 1.0, rng).prompt_answer_ids for _ in range(10))


def test_a_batch_of_all_kinds_trains(icae):
    ids = golden.case("three_spans")["input_ids"][0].tolist()
    samples = [autoencoding_sample(icae, ids), continuation_sample(icae, ids[:20], ids[20:60]),
               instruction_sample(icae, ids[:5], ids[5:9], ids[9:12])]  # fmt: skip
    out = icae(**pad_samples(icae, samples))
    singles = [icae(**pad_samples(icae, [s])) for s in samples]
    counts = torch.tensor([sum(label != -100 for label in s.labels) for s in samples])
    expected = (torch.stack([o["loss"] for o in singles]) * counts).sum() / counts.sum()
    torch.testing.assert_close(out["loss"], expected, rtol=1e-5, atol=1e-5)


def test_empty_texts_are_refused(icae):
    for call in (lambda: autoencoding_sample(icae, []), lambda: pretraining_sample(icae, [], 10),
                 lambda: continuation_sample(icae, [1], [])):  # fmt: skip
        with pytest.raises(InvalidInputError):
            call()
