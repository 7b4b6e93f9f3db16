"""One token step of a whole frozen language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from icae_fast.ops._declare import backend_of
from icae_fast.ops.decode_step.arguments import StepArguments, StepCache, StepWeights
from icae_fast.ops.decode_step.spec import SPEC

__all__ = ["SPEC", "BoundStep", "StepCache", "StepWeights", "bind_decode_step", "decode_step"]


def decode_step(
    tokens: torch.Tensor,
    weights: StepWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: StepCache,
    tail_starts: torch.Tensor,
    tail_lengths: torch.Tensor,
) -> torch.Tensor:
    """Return the logits of each row's next token, and write the step's keys and values to the cache.

    For a token of each row, with h its embedding, and for every layer

        q, k, v = W_qkv rms_norm(h) + b_qkv,    heads of q and k normalised (if qk_norms are given) and rotated
        h += W_o attention(q, keys, values) + b_o         over prefix and tail, k and v included
        h += W_down (silu(g) * u) + b_down,     g, u = W_gate_up rms_norm(h) + b_gate_up

    and finally logits = W_head rms_norm(h). h stays in the compute dtype (fp32, fp64 for fp64) throughout. All of it is
    one call, which reads every weight once for all rows, in the modules' memory.

    Args:
        tokens: (R,) int64.
        weights: see `StepWeights`.
        cos, sin: (R, D / 2) at each row's position, in the compute dtype; they hold for all layers.
        cache: see `StepCache`; this step's keys and values are written to the last place of each row's tail.
        tail_starts, tail_lengths: (R,) int32: row r's tail is [start, start + length), this step's token included.

    Returns:
        (R, V') logits in the compute dtype.
    """
    arguments = StepArguments.of(weights, cos, sin, cache, tail_starts, tokens, tail_lengths)
    return torch.ops.icae_fast.decode_step(*arguments)


class BoundStep(Protocol):
    """`decode_step` of rows whose weights and caches stay the same."""

    def step(self, tokens: torch.Tensor, tail_lengths: Sequence[int]) -> torch.Tensor:
        """Read one token of each row.

        Args:
            tokens: (R,) int64.
            tail_lengths: length of each row's tail, this token included.

        Returns:
            (R, V') logits.
        """

    def greedy(
        self, tokens: torch.Tensor, tail_lengths: Sequence[int], most: int, eos: Sequence[int], least: int
    ) -> torch.Tensor:
        """Read one token of each row and continue with the argmax (the first of equal logits), step after step.

        Args:
            tokens, tail_lengths: of the first step.
            most: maximum number of steps, 1 or more.
            eos: ids that end the run in whichever row they are chosen; no step follows.
            least: number of first steps in which no id of `eos` is chosen.

        Returns:
            (n, R) int64 tokens chosen by the n steps, n up to `most`.
        """


def bind_decode_step(
    weights: StepWeights, cos: torch.Tensor, sin: torch.Tensor, cache: StepCache, tail_starts: Sequence[int]
) -> BoundStep:
    """Return `decode_step` with everything that stays the same from step to step bound and checked once.

    Passing the weights costs 0.2 ms a step, 2 % of a token of SmolLM2 on a CPU. A kernel binds the memory that the
    tensors have now: it sees changes in place, but not another `.data`.

    Args:
        weights: see `StepWeights`.
        cos, sin: (P, D / 2), the RoPE tables of positions 0 to P - 1.
        cache: see `StepCache`.
        tail_starts: start of the tail of each of the R rows.
    """
    if backend_of("decode_step", weights.embedding.device) == "cpp":
        arguments = StepArguments.bound(weights, cos, sin, cache, list(tail_starts))
        return torch.classes.icae_fast.BoundStep(*arguments)
    starts = torch.tensor(tail_starts, dtype=torch.int32, device=weights.embedding.device)
    read = [0] * len(tail_starts)
    for keys, (begin, end) in zip(cache.prefix_keys, cache.prefix_rows, strict=True):
        read[begin:end] = [n + keys.shape[1] for n in read[begin:end]]

    def step(tokens: torch.Tensor, tail_lengths: Sequence[int]) -> torch.Tensor:
        positions = torch.tensor([p + n - 1 for p, n in zip(read, tail_lengths, strict=True)], device=cos.device)
        lengths = torch.tensor(tail_lengths, dtype=torch.int32, device=starts.device)
        return decode_step(tokens, weights, cos[positions], sin[positions], cache, starts, lengths)

    return _SingleSteps(step)


@dataclass(frozen=True)
class _SingleSteps:
    """A `BoundStep` that calls the op once a step."""

    step: Callable[[torch.Tensor, Sequence[int]], torch.Tensor]

    def greedy(
        self, tokens: torch.Tensor, tail_lengths: Sequence[int], most: int, eos: Sequence[int], least: int
    ) -> torch.Tensor:
        if most < 1:
            raise ValueError(f"at least one step must be asked for, not {most}")
        chosen: list[torch.Tensor] = []
        while len(chosen) < most:
            logits = self.step(tokens, [n + len(chosen) for n in tail_lengths])
            if len(chosen) < least:
                logits[:, [i for i in eos if i < logits.shape[1]]] = -torch.inf
            tokens = logits.max(-1).indices
            chosen.append(tokens)
            if not set(eos).isdisjoint(tokens.tolist()):
                break
        return torch.stack(chosen)
