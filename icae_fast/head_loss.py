"""Cross-entropy of a frozen head without its logits: a few rows at a time, gradient included."""

from __future__ import annotations

import torch

from icae_fast.errors import InvalidInputError

# Rows whose logits are held at once: at SmolLM2's vocabulary 256 rows are 50 MB in fp32. Fewer would read the head's
# weights more often than the products take.
CHUNK_ROWS = 256


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
    """Losses of each row against a frozen vocabulary head, never holding more than a few rows' logits.

        z_i    = W h_i + b,   t_i = W g_i + b
        loss_i = (1 - alpha) * (-log softmax(z_i)[target_i])
                 + alpha * tau^2 * KL(softmax(t_i / tau) || softmax(z_i / tau))

    A row's loss depends on that row alone and the head is frozen, so the gradient of each loss with respect to its
    row is taken while the logits are there, and the backward only scales rows: two products for each of the head's
    rows, where recomputing takes three, and (n, d) kept.

    Args:
        hidden: (n, d) final-normed hidden states h.
        weight: (V, d) of the head, frozen.
        targets: (n,) int64 ids.
        bias: (V,) or None.
        teacher_hidden: (n, d) hidden states g of the teacher, None for no distillation.
        alpha: share of the distillation term.
        temperature: tau.
        chunk_rows: rows whose logits are held at a time.

    Returns:
        losses (n,) fp32 (fp64 for fp64 inputs), differentiable with respect to `hidden`, and correct (n,) bool,
        whether the target has the highest logit.

    Raises:
        InvalidInputError: weight or bias asks for a gradient, or alpha without a teacher.

    Source: the gradient in the forward as in Hsu et al., arXiv 2410.10989 (Liger Kernel); Hinton et al., arXiv
    1503.02531 (distillation).
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise InvalidInputError("head_loss gives no gradient to the head: freeze it with requires_grad_(False)")
    if alpha and teacher_hidden is None:
        raise InvalidInputError("alpha asks for distillation; give teacher_hidden as well")
    if not alpha:
        teacher_hidden = None
    return _HeadLoss.apply(hidden, weight, targets, bias, teacher_hidden, alpha, temperature, chunk_rows)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, teacher_hidden, alpha, temperature, chunk_rows):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = hidden.new_empty(len(hidden), dtype=wide)
        correct = hidden.new_empty(len(hidden), dtype=torch.bool)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk_rows):
            part = slice(start, start + chunk_rows)
            teacher = None if teacher_hidden is None else teacher_hidden[part]
            chunk = _Chunk(hidden[part], weight, targets[part], bias, wide)
            losses[part], correct[part] = chunk.cross_entropy()
            if teacher is not None:
                losses[part] = chunk.distil(losses[part], teacher, alpha, temperature, gradient is not None)
            if gradient is not None:
                torch.mm(chunk.logit_gradient(1 - alpha).to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx, grad, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None].to(gradient), *[None] * 7)


class _Chunk:
    """Logits of a few rows, and what is made of them in their own memory."""

    def __init__(self, hidden, weight, targets, bias, wide):
        self.weight, self.targets, self.bias, self.wide = weight, targets[:, None], bias, wide
        self.logits = self._logits(hidden)
        self.of_teacher = None

    def _logits(self, hidden):
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return logits.to(self.wide)

    def cross_entropy(self):
        own = self.logits.gather(1, self.targets)
        highest = self.logits.amax(1, keepdim=True)
        self.log_sum = self.logits.logsumexp(1, keepdim=True)
        return (self.log_sum - own)[:, 0], (own >= highest)[:, 0]

    def distil(self, losses, teacher_hidden, alpha, temperature, gradient):
        """Both terms together; the teacher's part of the logits' gradient is kept for `logit_gradient`."""
        student = (self.logits / temperature).log_softmax(1)
        teacher = (self._logits(teacher_hidden) / temperature).log_softmax(1)
        probabilities = teacher.exp()
        divergence = (probabilities * (teacher - student)).sum(1)
        if gradient:
            self.of_teacher = student.exp_().sub_(probabilities).mul_(alpha * temperature)
        return (1 - alpha) * losses + alpha * temperature**2 * divergence

    def logit_gradient(self, share):
        """d loss / d logits: `share * (softmax - one-hot)` and the teacher's part; takes the logits' memory."""
        z = self.logits.sub_(self.log_sum).exp_()
        z.scatter_add_(1, self.targets, z.new_full(self.targets.shape, -1.0))
        if share != 1:
            z.mul_(share)
        return z if self.of_teacher is None else z.add_(self.of_teacher)
