"""Cross-entropy of a frozen head without materialising all logits: a few rows at a time, gradient included."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icae_fast.errors import InvalidInputError
from icae_fast.ops._precision import compute_dtype, without_autocast

# Rows whose logits are held at once: 512 rows are 50 MB in bf16 at SmolLM2's vocabulary. With fewer rows, reading the
# head's weights would dominate.
CHUNK_ROWS = 512
SUMMED_ROWS = 16  # 3 MB in fp32 at SmolLM2's vocabulary


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    teacher_hidden: torch.Tensor | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute each row's loss against a frozen vocabulary head, holding the logits of a few rows at a time.

        z_i    = W h_i + b,   t_i = W g_i + b
        loss_i = (1 - alpha) * (-log softmax(z_i)[target_i])
                 + alpha * tau^2 * KL(softmax(t_i / tau) || softmax(z_i / tau))

    A row's loss depends on that row only, and the head is frozen. The gradient of each loss with respect to its row is
    therefore computed while its logits exist, and the backward only scales rows. This takes two products per row of the
    head, where recomputation takes three, and keeps (n, d).

    Args:
        hidden: (n, d) final-normed hidden states h.
        weight: (V, d) of the head, frozen.
        targets: (n,) int64 ids.
        bias: (V,) or None.
        teacher_hidden: (n, d) hidden states g of the teacher, None for no distillation.
        alpha: weight of the distillation term.
        temperature: tau.
        chunk_rows: rows whose logits are held at once; half as many with a teacher, whose terms are in fp32.

    Returns:
        losses (n,) fp32 (fp64 for fp64 inputs), differentiable with respect to `hidden`, and correct (n,) bool,
        whether the target has the highest logit.

    Raises:
        InvalidInputError: weight or bias requires a gradient, or alpha without a teacher.

    Source: the gradient in the forward as in Hsu et al., arXiv 2410.10989 (Liger Kernel); Hinton et al., arXiv
    1503.02531 (distillation).
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise InvalidInputError("head_loss computes no gradient for the head: freeze it with requires_grad_(False)")
    if alpha and teacher_hidden is None:
        raise InvalidInputError("alpha requires a teacher; pass teacher_hidden as well")
    if not alpha:
        teacher_hidden = None
    return _HeadLoss.apply(hidden, weight, targets, bias, teacher_hidden, alpha, temperature, chunk_rows)


@torch.no_grad()
def head_argmax(
    hidden: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None, chunk_rows: int = CHUNK_ROWS
) -> torch.Tensor:
    """Return each row's `argmax_v (W h_i + b)_v`, holding the logits of a few rows at a time.

    Args:
        hidden: (n, d) final-normed hidden states h.
        weight: (V, d) of the head.
        bias: (V,) or None.
        chunk_rows: rows whose logits are held at once.

    Returns:
        (n,) int64.
    """
    return torch.cat([F.linear(rows, weight, bias).argmax(1) for rows in hidden.split(chunk_rows)])


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, teacher_hidden, alpha, temperature, chunk_rows):
        wide = compute_dtype(hidden, upcast=True)
        losses = hidden.new_empty(len(hidden), dtype=wide)
        correct = hidden.new_empty(len(hidden), dtype=torch.bool)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        if teacher_hidden is not None:
            chunk_rows = max(1, chunk_rows // 2)
        # One block serves all chunks: fresh memory for each cost a third of the products' time in page faults.
        block = hidden.new_empty(min(chunk_rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), chunk_rows):
            part = slice(start, start + chunk_rows)
            out = None if gradient is None else gradient[part]
            target = targets[part, None]
            logits = torch.mm(hidden[part], weight.t(), out=block[: len(target)])
            if bias is not None:
                logits.add_(bias)
            if teacher_hidden is None:
                losses[part], correct[part] = _cross_entropy(logits, target, weight, wide, out)
            else:
                of_teacher = F.linear(teacher_hidden[part], weight, bias)
                losses[part], correct[part] = _distil(
                    logits.to(wide), of_teacher.to(wide), target, weight, alpha, temperature, out
                )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @without_autocast
    def backward(ctx, grad, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None].to(gradient), *[None] * 7)


def _cross_entropy(logits, target, weight, wide, gradient):
    """Compute losses, correctness and gradient of a few rows; overwrites their logits.

    The softmax stays in the dtype of the logits: in fp32, its passes took half as long as the two products.
    """
    highest, own = logits.amax(1, keepdim=True), logits.gather(1, target)
    correct = own >= highest
    probabilities = logits.sub_(highest).exp_()
    # A few rows at a time: a sum in a wider dtype first widens its whole input, which took 5 % of a training step for
    # 50 MB of logits.
    total = torch.cat([rows.sum(1, keepdim=True, dtype=wide) for rows in probabilities.split(SUMMED_ROWS)])
    losses = total.log() + highest.to(wide) - own.to(wide)
    if gradient is not None:
        # The one-hot part is a row of the weights; subtracting it from the softmax would round it with the softmax.
        torch.mm(probabilities, weight, out=gradient).mul_(total.reciprocal()).sub_(weight[target[:, 0]])
    return losses[:, 0], correct[:, 0]


def _distil(logits, of_teacher, target, weight, alpha, temperature, gradient):
    """Compute the same with a teacher's logits, both in fp32 because their difference matters."""
    own = logits.gather(1, target)
    correct = own >= logits.amax(1, keepdim=True)
    log_p = logits.log_softmax(1)
    student, teacher = (logits / temperature).log_softmax(1), (of_teacher / temperature).log_softmax(1)
    q = teacher.exp()
    divergence = (q * (teacher - student)).sum(1)
    losses = (1 - alpha) * -log_p.gather(1, target)[:, 0] + alpha * temperature**2 * divergence
    if gradient is not None:
        p = log_p.exp_()
        p.scatter_add_(1, target, p.new_full(target.shape, -1.0)).mul_(1 - alpha)
        p.add_(student.exp_().sub_(q), alpha=alpha * temperature)
        torch.mm(p.to(weight.dtype), weight, out=gradient)
    return losses, correct[:, 0]
