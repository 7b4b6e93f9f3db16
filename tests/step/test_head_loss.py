"""The chunked head loss equals the loss over full logits, including gradients and distillation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from icae_fast.errors import InvalidInputError
from icae_fast.step.head_loss import head_loss


def plain(hidden, weight, targets, bias=None, teacher=None, alpha=0.0, temperature=1.0):
    """Compute the loss by its definition, from all logits at once."""
    logits = F.linear(hidden, weight, bias)
    losses = F.cross_entropy(logits, targets, reduction="none")
    if not alpha:
        return losses
    student = (logits / temperature).log_softmax(-1)
    of_teacher = (F.linear(teacher, weight, bias) / temperature).log_softmax(-1)
    divergence = F.kl_div(student, of_teacher, reduction="none", log_target=True).sum(-1)
    return (1 - alpha) * losses + alpha * temperature**2 * divergence


def make(n, d, v, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    targets = torch.randint(v, (n,), generator=g)
    return rand(n, d).requires_grad_(), rand(v, d), targets, rand(v), rand(n, d), rand(n)


@given(
    n=st.integers(1, 23), v=st.integers(2, 40), chunk=st.integers(1, 9), bias=st.booleans(),
    alpha=st.sampled_from([0.0, 0.3, 1.0]), temperature=st.sampled_from([1.0, 2.5]),
)  # fmt: skip
def test_losses_and_gradients_equal_the_definition(n, v, chunk, bias, alpha, temperature):
    hidden, weight, targets, b, teacher, grad = make(n, 5, v, seed=n * v)
    b = b if bias else None
    found, correct = head_loss(
        hidden, weight, targets, bias=b, teacher_hidden=teacher, alpha=alpha, temperature=temperature, chunk_rows=chunk
    )
    expected = plain(hidden, weight, targets, b, teacher, alpha, temperature)
    torch.testing.assert_close(found, expected)
    assert torch.equal(correct, F.linear(hidden, weight, b).argmax(-1) == targets)
    of_found, of_expected = (torch.autograd.grad(losses, hidden, grad)[0] for losses in (found, expected))
    torch.testing.assert_close(of_found, of_expected)


def test_bf16_inputs_are_computed_in_fp32():
    hidden, weight, targets, *_ = make(40, 64, 300, dtype=torch.bfloat16)
    found, _ = head_loss(hidden, weight, targets, chunk_rows=7)
    assert found.dtype == torch.float32
    wide = plain(hidden.double(), weight.double(), targets)
    rounded = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none").double()
    assert (found.double() - wide).abs().max() <= (rounded - wide).abs().max()
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (truth,) = torch.autograd.grad(wide.sum(), hidden)
    assert (gradient.double() - truth.double()).norm() < 0.01 * truth.double().norm()


def test_no_rows_have_empty_losses_and_detached_inputs_no_gradient():
    hidden, weight, targets, *_ = make(3, 4, 5)
    losses, correct = head_loss(hidden[:0], weight, targets[:0])
    assert losses.shape == correct.shape == (0,)
    assert not head_loss(hidden.detach(), weight, targets)[0].requires_grad


def test_trainable_heads_and_a_missing_teacher_are_refused():
    hidden, weight, targets, bias, *_ = make(3, 4, 5)
    with pytest.raises(InvalidInputError, match="freeze"):
        head_loss(hidden, weight.requires_grad_(), targets)
    with pytest.raises(InvalidInputError, match="freeze"):
        head_loss(hidden, weight.detach(), targets, bias=bias.requires_grad_())
    with pytest.raises(InvalidInputError, match="teacher_hidden"):
        head_loss(hidden, weight.detach(), targets, alpha=0.5)
