"""What a training step computes a second time in its backward, so that it need not be kept from the forward.

Two exact tricks, both invisible to autograd's users (optimisers, DDP and gradient accumulation see one graph):

* spans are independent given their slots, so all are encoded without a graph, the decoder's gradient at the slots is
  taken, and span after span runs again with a graph: the peak is that of one micro-batch of spans;
* a layer of the frozen decoder keeps the hidden state that it read, and by choice the result of its attention, whose
  cost grows with the square of the length; everything else in it is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from icae_fast.errors import ConfigError
from icae_fast.ops import attention_of, varlen_attention
from icae_fast.spans import PackedRows


@dataclass(frozen=True)
class Recompute:
    """What is computed again instead of kept; gradients are the same in any case.

    Args:
        spans: run the encoder without a graph first, and each micro-batch of spans once more for its backward.
        layers: keep of each decoder layer the hidden state that it reads, and compute the rest again.
        attention: with `layers`, compute attention again as well instead of keeping its result, which takes as
            much memory as the hidden state and `Hq * 4` bytes a token for the log-sum-exp.
        encoder_layers: treat the encoder's layers like that, too; pays where one span's graph is too large.
        offload: hold what is kept of layers in the host's memory. Nothing changes on a CPU.
        token_budget: context and memory tokens of a micro-batch of spans, which bounds its graph.

    Raises:
        ConfigError: token_budget is under 1.
    """

    spans: bool = True
    layers: bool = True
    attention: bool = False
    encoder_layers: bool = False
    offload: bool = False
    token_budget: int = 2048

    def __post_init__(self) -> None:
        if isinstance(self.token_budget, bool) or not isinstance(self.token_budget, int) or self.token_budget < 1:
            raise ConfigError(f"token_budget is {self.token_budget!r}; it must be a whole number of at least 1")


NOTHING = Recompute(spans=False, layers=False)


class RowsAttention:
    """Attention within packed rows, which remembers its result or is given it.

    Args:
        rows: the layout.
        known: (out, log-sum-exp) of an earlier run, which then are not computed again.

    Attributes:
        result: (out, log-sum-exp) of the last call.
    """

    def __init__(self, rows: PackedRows, known: Sequence[torch.Tensor] = ()) -> None:
        self.rows, self.result = rows, tuple(known)
        self._known = bool(known)

    def attend(self, layer, q, k, v, cu_seqlens_q, scale, window):
        """See `icae_fast.backbone.KeyValueCache`."""
        rows = self.rows
        longest = rows.max_seqlen if cu_seqlens_q is rows.cu_seqlens else rows.max_seqlen_out
        layout = (cu_seqlens_q, rows.cu_seqlens, longest, rows.max_seqlen)
        if self._known:
            return attention_of(*self.result, q, k, v, *layout, scale=scale, window=window)
        self.result = varlen_attention(q, k, v, *layout, scale=scale, window=window)
        return self.result[0]


class _Layer(torch.autograd.Function):
    """`run(hidden, *weights, attention)`, of which nothing but `hidden` and perhaps attention's result is kept."""

    @staticmethod
    def forward(ctx, run, rows, options, hidden, *weights):
        attention = RowsAttention(rows)
        out = run(hidden, *weights, attention=attention)
        kept = (hidden,) if options.attention else (hidden, *attention.result)
        ctx.run, ctx.rows, ctx.device, ctx.n_kept = run, rows, hidden.device, len(kept)
        if options.offload:
            kept = [t.to("cpu", non_blocking=True) for t in kept]
        ctx.save_for_backward(*kept, *weights)
        return out

    @staticmethod
    def backward(ctx, grad):
        kept, weights = ctx.saved_tensors[: ctx.n_kept], ctx.saved_tensors[ctx.n_kept :]
        hidden, *known = (t.to(ctx.device, non_blocking=True) for t in kept)
        needed = ctx.needs_input_grad[3:]
        inputs = [t.detach().requires_grad_(n) for t, n in zip((hidden, *weights), needed, strict=True)]
        with torch.enable_grad():
            out = ctx.run(*inputs, attention=RowsAttention(ctx.rows, known))
        return None, None, None, *gradients(out, inputs, grad)


def run_layer(
    run: Callable[..., torch.Tensor],
    rows: PackedRows,
    options: Recompute,
    hidden: torch.Tensor,
    *weights: torch.Tensor,
) -> torch.Tensor:
    """One layer that is computed again for its backward.

    Args:
        run: `run(hidden, *weights, attention=...)` gives the layer's (Tq, d) result, the same each time; it must
            attend by `attention.attend`.
        rows: the layout of the packed rows.
        options: what to keep.
        hidden: (T, d).
        weights: further tensors that may ask for a gradient (LoRA factors).

    Returns:
        (Tq, d).
    """
    return _Layer.apply(run, rows, options, hidden, *weights)


class _Replay(torch.autograd.Function):
    """All of `runs` without a graph; in the backward one after another, with one."""

    @staticmethod
    def forward(ctx, runs, sizes, *tensors):
        ctx.runs, ctx.sizes = runs, sizes
        ctx.save_for_backward(*tensors)
        # One block made beforehand: results kept one by one between activations hold the heap apart.
        out = tensors[0].new_empty(sum(sizes), tensors[0].shape[1])
        for run, part in zip(runs, out.split(sizes), strict=True):
            part.copy_(run(*tensors))
        return out

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[2:]
        leaves = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)]
        sums: list[Any] = [None] * len(leaves)
        for run, part in zip(ctx.runs, grad.split(ctx.sizes), strict=True):
            with torch.enable_grad():
                out = run(*leaves)
            # Added up in fp32: 128 spans in bf16 would lose the last of them.
            for i, g in enumerate(gradients(out, leaves, part)):
                if g is not None:
                    wide = g if g.dtype == torch.float64 else g.float()
                    sums[i] = wide if sums[i] is None else sums[i].add_(wide)
            del out
        return None, None, *(None if s is None else s.to(t) for s, t in zip(sums, leaves, strict=True))


def replay(runs: Sequence[Callable[..., torch.Tensor]], sizes: Sequence[int], *tensors: torch.Tensor) -> torch.Tensor:
    """The results of independent runs one under the other, each computed again for its own backward.

    Args:
        runs: each called with all of `tensors`, gives (size, d), the same each time (dropout by seed).
        sizes: rows of each run's result.
        tensors: what gets a gradient, summed up over runs in fp32 (fp64 for fp64); the first one has the results'
            dtype and width d.

    Returns:
        (sum of sizes, d).
    """
    return _Replay.apply(list(runs), list(sizes), *tensors)


def gradients(out: torch.Tensor, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor | None]:
    """`grad^T d out / d input` for those inputs that require it, None for the others."""
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True) if wanted else ())
    return [next(found) if t.requires_grad else None for t in inputs]
