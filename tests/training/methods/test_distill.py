"""The teacher reads the text in place of the student's slots, and predicts the same tokens."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from icae_fast.errors import ConfigError, ContextTooLongError, InvalidInputError
from icae_fast.step.budget import ActivationBudget
from icae_fast.step.labels import IGNORE
from icae_fast.step.loss import Teacher
from icae_fast.training.methods.batch import pack
from icae_fast.training.methods.distill import Distillation, distillation_loss, teacher_hidden, teacher_rows
from icae_fast.training.methods.objectives import (
    Sample,
    autoencoding_sample,
    continuation_sample,
    instruction_sample,
    with_memory_size,
)

ALL = Distillation(alpha=0.5, objectives=("ae", "lm", "ft"))


def make(icae, kind, n, rest):
    """Return a sample of `n` context tokens and `rest` further tokens."""
    ids = [3 + (7 * i + n) % 90 for i in range(n + rest)]
    if kind == "ae":
        return autoencoding_sample(icae, ids[:n])
    if kind == "lm":
        return continuation_sample(icae, ids[:n], ids[n:], lm_token=n % 2 == 0, leave=3)
    return instruction_sample(icae, ids[:n], ids[n : n + rest // 2], ids[n + rest // 2 :])


def test_rows_by_hand(tiny_icae):
    samples = [
        autoencoding_sample(tiny_icae, [10, 11, 12]),
        continuation_sample(tiny_icae, [10, 11, 12], [20, 21, 22, 23], lm_token=True, leave=2),
        instruction_sample(tiny_icae, [10, 11, 12], [30, 31], [40, 41]),
    ]
    teacher = teacher_rows(tiny_icae, pack(samples), ALL)
    # The last token of each row (EOS, 23, EOS) predicts nothing and is not read.
    assert [row.tolist() for row in teacher.ids] == [
        [10, 11, 12, 10, 11, 12], [10, 11, 12, 20, 21, 22], [10, 11, 12, 30, 31, 40, 41],
    ]  # fmt: skip
    assert [w.tolist() for w in teacher.wanted] == [[2, 3, 4, 5], [4, 5], [4, 5, 6]]
    assert teacher.covered.tolist() == [True] * 9
    assert teacher.n_too_long == 0


def test_what_stands_before_the_slots_stays(tiny_icae):
    memory = [tiny_icae.vocabulary.first_memory] * 4
    prompt = [50, 51, *memory, tiny_icae.vocabulary.ft, 60, 61, 62]
    labels = [7, 51, *[IGNORE] * 6, 61, 62]  # nothing predicts a row's first token, labelled or not
    teacher = teacher_rows(tiny_icae, pack([Sample([10, 11], prompt, labels, "ft")]), ALL)
    assert teacher.ids[0].tolist() == [50, 51, 10, 11, 60, 61]
    assert teacher.wanted[0].tolist() == [0, 4, 5]
    assert len(teacher.covered) == 3


ROWS = st.lists(st.tuples(st.sampled_from(["ae", "lm", "ft"]), st.integers(1, 40), st.integers(4, 20)), min_size=1,
                max_size=4)  # fmt: skip


@given(ROWS, st.integers(1, 4))
def test_the_teacher_predicts_the_labelled_tokens(tiny_icae, rows, k):
    samples = [with_memory_size(tiny_icae, make(tiny_icae, *row), k) for row in rows]
    teacher = teacher_rows(tiny_icae, pack(samples), ALL)
    for sample, ids, wanted in zip(samples, teacher.ids, teacher.wanted, strict=True):
        targets = [label for label in sample.labels if label != IGNORE]
        whole = [*ids.tolist(), targets[-1]]
        assert [whole[p + 1] for p in wanted.tolist()] == targets
        assert int(wanted[-1]) == len(ids) - 1
        assert max(whole) < tiny_icae.vocabulary.n_base


@pytest.mark.parametrize("token_budget", [1, 60, 4096])
def test_hidden_states_are_the_base_models(make_icae, model_kind, token_budget):
    icae = make_icae(model_kind)
    batch = pack([make(icae, kind, n, 9) for kind, n in (("ae", 20), ("lm", 33), ("ft", 5))])
    teacher = teacher_rows(icae, batch, ALL)
    # Removing a label in the middle must not move the others.
    teacher.wanted[1] = teacher.wanted[1][[0, 2, 5]]
    hidden = teacher_hidden(icae, teacher, token_budget)
    expected = []
    with torch.no_grad():
        for ids, wanted in zip(teacher.ids, teacher.wanted, strict=True):
            expected.append(icae.base_model.model(ids[None]).last_hidden_state[0, wanted])
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert not hidden.requires_grad


def test_a_sample_too_long_for_the_teacher(tiny_icae):
    samples = [make(tiny_icae, "ft", 20, 8), make(tiny_icae, "ft", 250, 8), make(tiny_icae, "ae", 9, 0)]
    long = replace(samples[1], origin="books.jsonl:17")
    batch = pack([samples[0], long, samples[2]])
    with pytest.raises(ContextTooLongError, match=r"books.jsonl:17 would read 258 tokens.*256 positions"):
        teacher_rows(tiny_icae, batch, Distillation(alpha=0.5))
    teacher = teacher_rows(tiny_icae, batch, Distillation(alpha=0.5, too_long="skip"))
    assert teacher.n_too_long == 1
    # By default only instruction samples (and continuations) have a teacher.
    assert teacher.covered.tolist() == [True] * 5 + [False] * 5 + [False] * 10
    assert len(teacher_hidden(tiny_icae, teacher)) == 5


def test_a_batch_without_a_teacher(tiny_icae):
    teacher = teacher_rows(tiny_icae, pack([make(tiny_icae, "ae", 9, 0)]), Distillation(alpha=0.5))
    assert not teacher.covered.any()
    assert teacher_hidden(tiny_icae, teacher).shape == (0, tiny_icae.backbone.hidden_size)


def test_memory_ids_have_to_be_in_one_piece(tiny_icae):
    memory = tiny_icae.vocabulary.first_memory
    for prompt in ([5, 6, 7], [memory, 5, memory, 6]):
        sample = Sample([10, 11], prompt, [IGNORE] * (len(prompt) - 1) + prompt[-1:], "ft", "rows.jsonl:3")
        with pytest.raises(InvalidInputError, match=r"rows.jsonl:3 has no memory ids, or scattered"):
            teacher_rows(tiny_icae, pack([sample]), ALL)


@given(st.floats(0, 1), st.floats(0.3, 4), st.integers(0, 100))
def test_loss_is_the_formula(alpha, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (5,), generator=generator)
    p, q = (x.div(temperature).softmax(-1) for x in (teacher, logits))
    divergence = (p * (p / q).log()).sum(-1)
    entropy = -logits.softmax(-1)[torch.arange(5), targets].log()
    got = distillation_loss(logits, teacher, targets, alpha, temperature)
    torch.testing.assert_close(got, (1 - alpha) * entropy + alpha * temperature**2 * divergence)
    torch.testing.assert_close(distillation_loss(logits, logits, targets, 1.0, temperature), torch.zeros_like(got))


def test_gradients_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    targets = torch.tensor([1, 6, 0])
    assert torch.autograd.gradcheck(
        lambda x: distillation_loss(x, teacher, targets, 0.7, 2.0), logits.clone().requires_grad_()
    )


@pytest.mark.parametrize("kept_bytes", [0, None])
def test_token_losses_take_a_teacher(make_icae, kept_bytes):
    """With a teacher for some tokens and k' slots, losses and gradients are those of the formula."""
    icae, k = make_icae(memory_positions="spread"), 2
    rows = (("ft", 20, 8), ("ae", 9, 0), ("ft", 7, 9), ("ft", 250, 8))
    samples = [with_memory_size(icae, make(icae, *row), k) for row in rows]
    batch, settings = pack(samples), Distillation(alpha=0.7, temperature=2.0, too_long="skip")
    chosen = teacher_rows(icae, batch, settings)
    teacher = Teacher(teacher_hidden(icae, chosen), chosen.covered, settings.alpha, settings.temperature)
    columns = [[torch.tensor(getattr(s, n)) for s in samples] for n in ("input_ids", "prompt_answer_ids", "labels")]
    budget = ActivationBudget(bytes=kept_bytes)
    got = icae.token_losses(*columns, budget, memory_size=k, teacher=teacher)

    contexts, prompts, labels = columns
    embeddings = [icae.tokens_to_embeddings(p) for p in prompts]
    filled = [
        e.index_put((icae.vocabulary.is_memory(p).nonzero(as_tuple=True)[0],), s)
        for e, p, s in zip(embeddings, prompts, icae.encode(contexts, memory_size=k), strict=True)
    ]
    logits = [icae.base_model(inputs_embeds=e[None]).logits[0, :-1][y[1:] != IGNORE]
              for e, y in zip(filled, labels, strict=True)]  # fmt: skip
    targets = [y[1:][y[1:] != IGNORE] for y in labels]
    of_teacher = iter(icae.base_model.lm_head(teacher.hidden).split([5, 6]))
    losses = [
        distillation_loss(z, next(of_teacher), y, 0.7, 2.0) if i in (0, 2) else F.cross_entropy(z, y, reduction="none")
        for i, (z, y) in enumerate(zip(logits, targets, strict=True))
    ]
    torch.testing.assert_close(got.losses, torch.cat(losses), rtol=1e-4, atol=1e-4)
    parameters = [p for p in icae.parameters() if p.requires_grad]
    expected = torch.autograd.grad(torch.cat(losses).sum(), parameters)
    for grad, wanted in zip(torch.autograd.grad(got.losses.sum(), parameters), expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidInputError, match="make it of the same batch"):
        icae.token_losses(*(column[:1] for column in columns), memory_size=k, teacher=teacher)


def test_a_student_learns_from_the_teacher(make_icae, one_thread):
    """With alpha = 1 the loss has no labels; the student approaches the teacher."""
    icae = make_icae(lora_rank=8, lora_alpha=8, lora_dropout=0.0).train()
    sample = instruction_sample(icae, list(range(10, 18)), [30, 31], [40, 41, 42, 43])
    chosen = teacher_rows(icae, pack([sample]), ALL)
    teacher = Teacher(teacher_hidden(icae, chosen), chosen.covered, alpha=1.0)
    columns = [[torch.tensor(row)] for row in (sample.input_ids, sample.prompt_answer_ids, sample.labels)]
    optimizer = torch.optim.AdamW([p for p in icae.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = icae.token_losses(*columns, teacher=teacher).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_reading_settings():
    assert Distillation.from_dict({}) == Distillation()
    assert Distillation.from_dict({"alpha": 1, "objectives": ["ft"]}).objectives == ("ft",)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": True}, "alpha is True"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": "2"}, "temperature is '2'"),
        ({"objectives": []}, r"objectives are \[\]"),
        ({"objectives": "ft"}, "objectives are 'ft'"),
        ({"objectives": ["warm"]}, "give some of ae, lm, ft"),
        ({"too_long": "truncate"}, "one of stop, skip"),
        ({"token_budget": 0}, "token_budget is 0"),
        ({"temprature": 2}, "did you mean temperature"),
    ],
)
def test_bad_settings_are_refused(fields, told):
    with pytest.raises(ConfigError, match=told):
        Distillation.from_dict(fields)
    with pytest.raises(ConfigError, match="give fields"):
        Distillation.from_dict([])
