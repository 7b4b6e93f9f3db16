"""The two passes of a training step under an activation budget: encode spans, decode behind their slots."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from icae_fast.backbone.rows import PackedRows, micro_batches, span_tokens_on
from icae_fast.backbone.sharding import least_of_all
from icae_fast.core.encoder import embed_spans, memory_tokens_of, scale_slots, slot_norm
from icae_fast.core.spans import CutContext, slots_per_span
from icae_fast.errors import UnsupportedModelError
from icae_fast.ops._precision import compute_dtype, without_autocast
from icae_fast.step.budget import ActivationBudget, plan
from icae_fast.step.tape import Level, backward_stack, forward_stack

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore


class TrainingStep:
    """Encode contexts and run the frozen decoder, keeping the activations that the budget allows.

    Each pass is one autograd node, so that hooks on parameters (DDP) fire once and gradient accumulation works as
    usual. A base model with modules that the ops do not compute goes through `torch.utils.checkpoint` instead: each
    micro-batch of spans, and the decoder as a whole.

    If the base model is sharded, all processes run a step together. Each gathers the layers as often as the process
    with the most micro-batches of spans.

    Args:
        core: the model.
        contexts: (L_i,) ids.
        decoder_tokens: packed tokens that `decode` will read.
        budget: limit of the kept activations.
        memory_size: slots per span, see `ICAE.encode`.

    Raises:
        UnsupportedModelError: the base model is sharded and has modules that the ops do not compute.
    """

    def __init__(
        self,
        core: ICAECore,
        contexts: Sequence[torch.Tensor],
        decoder_tokens: int,
        budget: ActivationBudget,
        memory_size: int | None = None,
    ) -> None:
        k = slots_per_span(core.config, memory_size)
        self.core, self.budget, self.memory_size = core, budget, k
        cuts = [CutContext.of(ids, core.config).spans() for ids in contexts]
        spans = [span for cut in cuts for span in cut]
        sizes = [len(s) + k for s in spans]
        ranges = list(micro_batches(sizes, span_tokens_on(core.device, budget.span_tokens)))
        self.batches = [[spans[i] for i in r] for r in ranges]
        self.slot_counts = [len(cut) * k for cut in cuts]
        self.plain = core.backbone.is_plain_stack(core.backbone.embedding)
        sharded = core.backbone.is_sharded
        # Autograd would keep gathered weights; the tape does not.
        self.keep_all = not torch.is_grad_enabled() or (budget.bytes is None and not sharded)
        self.plan = None
        if self.plain and not self.keep_all:
            tokens = [sum(sizes[i] for i in r) for r in ranges]
            self.plan = plan(budget, core.backbone, core.dtype.itemsize, decoder_tokens, tokens)
        elif sharded and not self.keep_all:
            raise UnsupportedModelError(
                "the base model is sharded by FSDP2, and the kernels do not compute some of its layers (another "
                "activation, quantised, hooked or unfrozen modules), so they cannot be trained through; launch "
                "without FSDP"
            )
        self.passes, self.first_again = self._agree() if sharded else (len(self.batches), len(self.batches))

    def _agree(self) -> tuple[int, int]:
        """Agree with the other processes on the most micro-batches of spans and the first that runs again.

        The second number counts in the order of the backward and is the minimum over processes that rerun any.
        """
        n, n_kept = len(self.batches), sum(_keeps(levels) for levels in self.plan.spans) if self.plan else 0
        least = least_of_all([-n, n_kept if n_kept < n else sys.maxsize], self.core.device)
        return -least[0], least[1]

    def encode(self) -> list[torch.Tensor]:
        """Return the slots of each context, (n_spans_i * k, d)."""
        core = self.core
        lora = core.adapter.pack(core.dtype)
        norm = slot_norm(core)
        if self.plan:
            memory_tokens, factors = (
                memory_tokens_of(core, self.memory_size),
                (*(p.a for p in lora), *(p.b for p in lora)),
            )
            slots = _Encode.apply(self, lora, norm, memory_tokens, core.slot_gain, *factors)
        else:
            slots = torch.cat([self._encode_by_autograd(spans, lora, norm) for spans in self.batches])
            self.stand_by_for_others()
        return list(slots.split(self.slot_counts))

    def stand_by_for_others(self) -> None:
        """Take part in the gathers of other processes' micro-batches of spans, if this process has fewer."""
        for _ in range(len(self.batches), self.passes):
            self.core.backbone.stand_by(1)

    def _encode_by_autograd(self, spans, lora, norm):
        core = self.core

        def run(weight, gain):
            x, rows = embed_spans(core, spans, weight[: self.memory_size].to(core.dtype))
            return scale_slots(core.backbone.forward(x, rows, lora), norm, gain)

        return self._again(run, core.memory_token_embed.weight, core.slot_gain)

    def decode(self, x: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        """Return the frozen decoder's final-normed hidden states at `rows.out_rows`, (Tq, d).

        Args:
            x: (T, d) embeddings.
            rows: their layout.
        """
        backbone = self.core.backbone
        if not self.plan:
            return self._again(lambda x: backbone.forward(x, rows), x)
        return backbone.final_norm(_Decode.apply(self, rows, x))

    def _again(self, run, *tensors):
        if self.keep_all:
            return run(*tensors)
        offload = torch.autograd.graph.save_on_cpu() if self.budget.offload else nullcontext()
        with offload:
            return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step, rows, x):
        out, ctx.tape = forward_stack(step.core.backbone, x, rows, None, step.plan.decoder, offload=step.budget.offload)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        tape, ctx.tape = _used_up(ctx.tape), None
        return None, None, backward_stack(tape, grad)[0]


class _Encode(torch.autograd.Function):
    """Slots of all micro-batches of spans; the backward reruns the micro-batches that the plan does not keep."""

    @staticmethod
    def forward(ctx, step, lora, norm, memory_tokens, gain, *factors):
        ctx.step, ctx.lora, ctx.norm = step, lora, norm
        ctx.save_for_backward(memory_tokens, gain, *factors)
        counts = [len(spans) * len(memory_tokens) for spans in step.batches]
        # One block allocated up front: results kept one by one between activations fragment the heap.
        slots = memory_tokens.new_empty(sum(counts), memory_tokens.shape[1])
        ctx.runs = []
        for spans, levels, part in zip(step.batches, step.plan.spans, slots.split(counts), strict=True):
            hidden, tape = _run_spans(step, spans, lora, memory_tokens, levels)
            part.copy_(_finish(step, hidden, norm, gain))
            ctx.runs.append((hidden, tape) if _keeps(levels) else None)
        step.stand_by_for_others()
        return slots

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        step, runs = ctx.step, _used_up(ctx.runs)
        ctx.runs = None
        memory_tokens, gain, *factors = ctx.saved_tensors
        everything = (Level.ALL,) * step.core.backbone.n_layers
        parts = grad.split([len(spans) * len(memory_tokens) for spans in step.batches])
        sums = [None] * (2 + len(factors))
        # Micro-batches with kept activations come first, to free them.
        order = sorted(range(len(runs)), key=lambda i: runs[i] is None)
        for n_done in range(step.passes):
            i = order[n_done] if n_done < len(order) else None
            if n_done >= step.first_again and (i is None or runs[i]):
                step.core.backbone.stand_by(1)
            if i is None:
                step.core.backbone.stand_by(-1)
                continue
            hidden, tape = runs[i] or _run_spans(step, step.batches[i], ctx.lora, memory_tokens, everything)
            runs[i] = None
            dhidden, dgain = _finish_backward(step, hidden, ctx.norm, gain, parts[i])
            rows = tape.rows.out_rows
            dx, of_factors = backward_stack(tape, dhidden)
            dmemory = dx[rows].unflatten(0, (-1, len(memory_tokens))).sum(0, dtype=compute_dtype(dx, upcast=True))
            _add_up(sums, (dmemory, dgain, *of_factors))
        grads = [
            s.to(t) if s is not None and n else None
            for s, t, n in zip(sums, (memory_tokens, gain, *factors), ctx.needs_input_grad[3:], strict=True)
        ]
        return None, None, None, *grads


def _keeps(levels):
    return levels[0] > Level.NOTHING


def _run_spans(step, spans, lora, memory_tokens, levels):
    x, rows = embed_spans(step.core, spans, memory_tokens)
    return forward_stack(step.core.backbone, x, rows, lora, levels, offload=step.budget.offload)


def _finish(step, hidden, norm, gain):
    """Turn the last layer's hidden states into slots."""
    return scale_slots(step.core.backbone.final_norm(hidden), norm, gain)


def _finish_backward(step, hidden, norm, gain, grad):
    inputs = [t.detach().requires_grad_() for t in (hidden, gain) if t is not None]
    with torch.enable_grad():
        slots = _finish(step, inputs[0], norm, None if gain is None else inputs[1])
    found = torch.autograd.grad(slots, inputs, grad)
    return found[0], None if gain is None else found[1]


def _add_up(sums, values):
    """Accumulate in fp32: with 128 spans, a bf16 sum would lose the last ones."""
    for i, value in enumerate(values):
        if value is not None:
            sums[i] = value.to(compute_dtype(value, upcast=True)) if sums[i] is None else sums[i].add_(value)


def _used_up(tape):
    if tape is None:
        raise RuntimeError(
            "the graph of a training step serves one backward; run the forward again, or use an ActivationBudget with "
            "bytes=None, for a second"
        )
    return tape
