"""The warm start's loss is its formula for any lengths, and trains an encoder."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icae_fast.core.spans import span_lengths
from icae_fast.errors import InvalidInputError
from icae_fast.training.methods.warm_start import share_means, warm_start_loss

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def by_hand(icae, contexts, slots, k):
    """Return (loss, slots whose own target is the nearest), computed slot by slot in fp64."""
    table, loss, right = icae.base_model.get_input_embeddings().weight.double(), 0.0, 0
    for ids, row in zip(contexts, slots, strict=True):
        cut = span_lengths(len(ids), icae.config)
        for span, own in zip(ids.split(cut), row.double().split(k), strict=True):
            n = len(span)
            shares = [(i * n // k, max((i + 1) * n // k, i * n // k + 1)) for i in range(k)]
            targets = torch.stack([table[span[a:b]].mean(0) for a, b in shares])
            for i in range(k):
                cosines = torch.cosine_similarity(own[i][None], targets, dim=1)
                loss += torch.logsumexp(10 * cosines, 0) - 10 * cosines[i] + 1 - cosines[i]
                right += int(cosines[i] >= cosines.max() - 1e-9)
    return loss, right


@given(LENGTHS, st.integers(1, 4), st.integers(0, 100))
def test_loss_is_the_formula(tiny_icae, random_ids, lengths, k, seed):
    contexts = [random_ids(n, seed=seed + i) for i, n in enumerate(lengths)]
    generator = torch.Generator().manual_seed(seed)
    slots = [
        torch.randn(len(span_lengths(n, tiny_icae.config)) * k, tiny_icae.backbone.hidden_size, generator=generator)
        for n in lengths
    ]
    got = warm_start_loss(tiny_icae, contexts, slots, k)
    expected, right = by_hand(tiny_icae, contexts, slots, k)
    assert got.n_slots == sum(map(len, slots))
    torch.testing.assert_close(got.loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert int(got.n_right) == right
    assert got.accuracy == right / got.n_slots


@given(LENGTHS, st.integers(1, 9))
def test_perfect_slots_are_all_right(tiny_icae, random_ids, lengths, k):
    ids = random_ids(sum(lengths), seed=k)
    means = share_means(tiny_icae, ids, lengths, k)
    assert means.shape == (len(lengths), k, tiny_icae.backbone.hidden_size)
    if all(n % k == 0 for n in lengths):  # shares are equal, so a mean over shares is the mean over the span
        spans = [tiny_icae.embed(s).mean(0) for s in ids.split(lengths)]
        torch.testing.assert_close(means.mean(1), torch.stack(spans), rtol=1e-5, atol=1e-5)
    contexts = [s for s in ids.split(lengths) if len(s) <= 16]
    if contexts and k <= 4:
        slots = [7.0 * m for m, n in zip(means, lengths, strict=True) if n <= 16]
        got = warm_start_loss(tiny_icae, contexts, slots, k)
        assert got.accuracy == 1.0
        assert got.loss <= got.n_slots * math.log(k) + 1e-3


def test_gradients_are_those_of_the_formula(make_base, make_icae, random_ids):
    icae = make_icae(base=make_base().double())
    contexts, k = [random_ids(21), random_ids(3)], 2
    slots = [torch.randn(4, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)]
    slots = [s.requires_grad_() for s in slots]
    assert warm_start_loss(icae, contexts, slots, k).loss.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *rows: warm_start_loss(icae, contexts, rows, k).loss, slots, fast_mode=True)


def test_bf16_slots_are_compared_in_fp32(tiny_icae, random_ids):
    ids = random_ids(16)
    slots = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = warm_start_loss(tiny_icae, [ids], [slots.float()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = warm_start_loss(tiny_icae, [ids], [slots])
    assert got.loss.dtype == torch.float32
    assert torch.equal(got.loss, expected.loss)


def test_an_encoder_learns(make_icae, random_ids, one_thread):
    icae = make_icae(memory_positions="spread", lora_rank=8, lora_alpha=8, lora_dropout=0.0).train()
    optimizer = torch.optim.AdamW([p for p in icae.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    rows, accuracies = random_ids(8 * 4, seed=5).split(4), []
    for _ in range(60):
        warm = warm_start_loss(icae, rows, icae.encode(rows))
        optimizer.zero_grad()
        (warm.loss / warm.n_slots).backward()
        optimizer.step()
        accuracies.append(warm.accuracy)
    assert accuracies[0] < 0.6
    assert accuracies[-1] > 0.95


@pytest.mark.parametrize(
    ("n_tokens", "n_slots", "told"),
    [([16], [3], "1 spans of 4 slots, but 3"), ([0], [4], "0 spans"), ([], [], "0 contexts"), ([16], [], "0 rows")],
)
def test_slots_that_do_not_fit_are_refused(tiny_icae, random_ids, n_tokens, n_slots, told):
    with pytest.raises(InvalidInputError, match=told):
        warm_start_loss(tiny_icae, [random_ids(n) for n in n_tokens], [torch.zeros(n, 32) for n in n_slots])
