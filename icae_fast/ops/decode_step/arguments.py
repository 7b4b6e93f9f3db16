"""Arguments of `decode_step`, grouped by owner, and the flat list that the op takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class StepWeights:
    """Weights and settings of a frozen language model.

    Args:
        embedding: (V, d) fp32, bf16 or fp64, as all tensors here; on a GPU fp32, fp16 or bf16.
        norms: (d,) each: the norms of attention and MLP of each layer in turn, then the final norm.
        matrices: of each layer in turn W_qkv ((Hq + 2 Hkv) D, d), W_o (d, Hq D), W_gate_up (2 m, d), W_down (d, m).
        biases: of each matrix, or None.
        qk_norms: (2, D) of each layer, norm weights of q and of k, or None.
        head: (V', d).
        num_q_heads, num_kv_heads: Hq and Hkv.
        scale: factor of the attention scores.
        norm_eps: epsilon of all norms.
        windows: sliding window of each layer in keys, 0 for none.
    """

    embedding: torch.Tensor
    norms: list[torch.Tensor]
    matrices: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    qk_norms: list[torch.Tensor | None]
    head: torch.Tensor
    num_q_heads: int
    num_kv_heads: int
    scale: float
    norm_eps: float
    windows: list[int]


@dataclass(frozen=True)
class StepCache:
    """Keys and values of rows: segments that several rows share, then a tail of each row.

    Args:
        keys, values: (layers, N, Hkv, D), the tails of all rows.
        prefix_keys, prefix_values: (layers, S_s, Hkv, D) of each shared segment.
        prefix_rows: first row and one past the last row that read each segment, see
            `icae_fast.ops.shared_prefix_attention`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    prefix_keys: list[torch.Tensor]
    prefix_values: list[torch.Tensor]
    prefix_rows: Sequence[tuple[int, int]]


class StepArguments(NamedTuple):
    """The arguments of the op `decode_step` in its schema's order, which is the order of `BoundStep` in C++ too."""

    tokens: torch.Tensor
    embedding: torch.Tensor
    norms: list[torch.Tensor]
    matrices: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    qk_norms: list[torch.Tensor | None]
    head: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    tail_keys: torch.Tensor
    tail_values: torch.Tensor
    tail_starts: torch.Tensor
    tail_lengths: torch.Tensor
    prefix_keys: list[torch.Tensor]
    prefix_values: list[torch.Tensor]
    prefix_rows: list[int]
    num_q_heads: int
    num_kv_heads: int
    scale: float
    norm_eps: float
    windows: list[int]

    @classmethod
    def of(
        cls, weights: StepWeights, cos: torch.Tensor, sin: torch.Tensor, cache: StepCache,
        tail_starts: torch.Tensor, tokens: torch.Tensor, tail_lengths: torch.Tensor,
    ) -> StepArguments:  # fmt: skip
        """Flatten weights and cache."""
        return cls(
            tokens=tokens, cos=cos, sin=sin, tail_keys=cache.keys, tail_values=cache.values, tail_starts=tail_starts,
            tail_lengths=tail_lengths, prefix_keys=cache.prefix_keys, prefix_values=cache.prefix_values,
            prefix_rows=[i for pair in cache.prefix_rows for i in pair], **vars(weights),
        )  # fmt: skip

    @classmethod
    def bound(
        cls, weights: StepWeights, cos: torch.Tensor, sin: torch.Tensor, cache: StepCache, tail_starts: list[int]
    ) -> tuple[Any, ...]:
        """Return the arguments that stay the same from step to step: all but `tokens` and `tail_lengths`.

        They are in the order of `BoundStep` in C++, which takes `tail_starts` as a list.
        """
        later = weights.embedding.new_empty(0)
        given = cls.of(weights, cos, sin, cache, later, later, later)._asdict() | {"tail_starts": tail_starts}
        return tuple(v for name, v in given.items() if name not in ("tokens", "tail_lengths"))
