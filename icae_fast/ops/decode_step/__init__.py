"""One token step of a whole frozen language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from icae_fast.ops._declare import backend_of
from icae_fast.ops.decode_step.spec import SPEC

__all__ = ["SPEC", "BoundStep", "bind_decode_step", "decode_step"]


def decode_step(
    tokens: torch.Tensor,
    embedding: torch.Tensor,
    norms: Sequence[torch.Tensor],
    matrices: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    qk_norms: Sequence[torch.Tensor | None],
    head: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    tail_starts: torch.Tensor,
    tail_lengths: torch.Tensor,
    prefix_keys: Sequence[torch.Tensor],
    prefix_values: Sequence[torch.Tensor],
    prefix_rows: Sequence[tuple[int, int]],
    *,
    num_q_heads: int,
    num_kv_heads: int,
    scale: float,
    norm_eps: float,
    windows: Sequence[int],
) -> torch.Tensor:
    """Logits of each row's next token, and the step's keys and values put into the cache.

    For a token of each row, with h its embedding, and for every layer

        q, k, v = W_qkv rms_norm(h) + b_qkv,    heads of q and k normalised (where qk_norms are given) and turned
        h += W_o attention(q, keys, values) + b_o         over prefix and tail, k and v included
        h += W_down (silu(g) * u) + b_down,     g, u = W_gate_up rms_norm(h) + b_gate_up

    and last logits = W_head rms_norm(h). h stays in the compute type (fp32, fp64 for fp64) throughout. All of it is
    one call: the weights are read where they lie, each once for all rows.

    Args:
        tokens: (R,) int64.
        embedding: (V, d) fp32, bf16 or fp64, as all tensors but cos and sin.
        norms: (d,) each: of each layer's attention and MLP in turn, and the final one.
        matrices: of each layer in turn, W_qkv ((Hq + 2 Hkv) D, d), W_o (d, Hq D), W_gate_up (2 I, d), W_down (d, I).
        biases: theirs, or None.
        qk_norms: (2, D) of each layer, of q and of k, or None.
        head: (V', d).
        cos, sin: (R, D / 2) of each row's position, in the compute type.
        tail_keys, tail_values: (layers, N, Hkv, D); this step's are written to the last place of each row's tail.
        tail_starts, tail_lengths: (R,) int32: row r's tail is [start, start + length), this step's token included.
        prefix_keys, prefix_values: (layers, S_s, Hkv, D) of each segment that several rows share.
        prefix_rows: see `icae_fast.ops.shared_prefix_attention`.
        num_q_heads, num_kv_heads: Hq and Hkv.
        scale: factor of the attention scores.
        norm_eps: of all norms.
        windows: sliding window of each layer in keys, 0 for none.

    Returns:
        (R, V') logits in the compute type.
    """
    rows = [i for pair in prefix_rows for i in pair]
    return torch.ops.icae_fast.decode_step(
        tokens, embedding, norms, matrices, biases, qk_norms, head, cos, sin, tail_keys, tail_values,
        tail_starts, tail_lengths, prefix_keys, prefix_values, rows, num_q_heads, num_kv_heads, scale, norm_eps,
        windows,
    )  # fmt: skip


class BoundStep(Protocol):
    """`decode_step` of rows whose weights and caches stay the same."""

    def step(self, tokens: torch.Tensor, tail_lengths: Sequence[int]) -> torch.Tensor:
        """Read a token a row.

        Args:
            tokens: (R,) int64.
            tail_lengths: of each row's tail, with this token.

        Returns:
            (R, V') logits.
        """

    def greedy(
        self, tokens: torch.Tensor, tail_lengths: Sequence[int], most: int, eos: Sequence[int], least: int
    ) -> torch.Tensor:
        """Read a token a row and go on with the most likely ones (the first of equals), step after step.

        Args:
            tokens, tail_lengths: of the first step.
            most: steps at most, 1 or more.
            eos: ids after which no further step is made, whatever row they come in.
            least: steps that give none of `eos`.

        Returns:
            (n, R) int64 tokens that the n steps gave, n up to `most`.
        """


def bind_decode_step(
    embedding: torch.Tensor,
    norms: Sequence[torch.Tensor],
    matrices: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    qk_norms: Sequence[torch.Tensor | None],
    head: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    tail_keys: torch.Tensor,
    tail_values: torch.Tensor,
    tail_starts: Sequence[int],
    prefix_keys: Sequence[torch.Tensor],
    prefix_values: Sequence[torch.Tensor],
    prefix_rows: Sequence[tuple[int, int]],
    *,
    num_q_heads: int,
    num_kv_heads: int,
    scale: float,
    norm_eps: float,
    windows: Sequence[int],
) -> BoundStep:
    """`decode_step` with all that stays the same from step to step bound and checked once.

    Handing over the weights costs a fifth of a millisecond a step, which is 2 % of a token of SmolLM2 on a CPU. What a
    kernel binds is the memory that the tensors have now: changes in place are seen, another `.data` is not.

    Args:
        cos, sin: (P, D / 2), the rotary tables of all positions from 0.
        tail_starts: where each of the R rows' tails begins.
        others: see `decode_step`.
    """
    if backend_of("decode_step", embedding.device) == "cpp":
        return torch.classes.icae_fast.BoundStep(
            embedding, list(norms), list(matrices), list(biases), list(qk_norms), head, cos, sin, tail_keys,
            tail_values, list(tail_starts), list(prefix_keys), list(prefix_values),
            [i for pair in prefix_rows for i in pair], num_q_heads, num_kv_heads, scale, norm_eps, list(windows),
        )  # fmt: skip
    starts = torch.tensor(tail_starts, dtype=torch.int32, device=embedding.device)
    read = [0] * len(tail_starts)
    for keys, (begin, end) in zip(prefix_keys, prefix_rows, strict=True):
        read[begin:end] = [n + keys.shape[1] for n in read[begin:end]]

    def step(tokens: torch.Tensor, tail_lengths: Sequence[int]) -> torch.Tensor:
        positions = torch.tensor([p + n - 1 for p, n in zip(read, tail_lengths, strict=True)], device=cos.device)
        lengths = torch.tensor(tail_lengths, dtype=torch.int32, device=embedding.device)
        return decode_step(
            tokens, embedding, norms, matrices, biases, qk_norms, head, cos[positions], sin[positions], tail_keys,
            tail_values, starts, lengths, prefix_keys, prefix_values, prefix_rows, num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads, scale=scale, norm_eps=norm_eps, windows=windows,
        )  # fmt: skip

    return _Steps(step)


@dataclass(frozen=True)
class _Steps:
    """A `BoundStep` of single steps."""

    step: Callable[[torch.Tensor, Sequence[int]], torch.Tensor]

    def greedy(
        self, tokens: torch.Tensor, tail_lengths: Sequence[int], most: int, eos: Sequence[int], least: int
    ) -> torch.Tensor:
        if most < 1:
            raise ValueError(f"at least one step must be asked for, not {most}")
        chosen = []
        while len(chosen) < most:
            logits = self.step(tokens, [n + len(chosen) for n in tail_lengths])
            if len(chosen) < least:
                logits[:, [i for i in eos if i < logits.shape[1]]] = -torch.inf
            tokens = logits.max(-1).indices
            chosen.append(tokens)
            if not set(eos).isdisjoint(tokens.tolist()):
                break
        return torch.stack(chosen)
