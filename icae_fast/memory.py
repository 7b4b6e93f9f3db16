"""`Memory`: a compressed context."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """The memory slots of one context, all its spans in order.

    Args:
        slots: (n_spans * k, d) in the model's dtype, what the decoder reads in place of the text.
        n_source_tokens: tokens of the context.
        span_lengths: tokens of each span; their sum is `n_source_tokens`.
    """

    slots: torch.Tensor
    n_source_tokens: int
    span_lengths: tuple[int, ...]

    @property
    def n_slots(self) -> int:
        """Number of slots, the positions that this memory takes in the decoder."""
        return self.slots.shape[0]

    @property
    def memory_size(self) -> int:
        """k, slots a span."""
        return self.n_slots // len(self.span_lengths)

    @property
    def compression_ratio(self) -> float:
        """Context tokens a slot, as it came out (a short span has fewer than the rate)."""
        return self.n_source_tokens / self.n_slots

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self.slots.nbytes

    def to(self, *args, **kwargs) -> Memory:
        """A copy with the slots moved or cast by `torch.Tensor.to`."""
        return Memory(self.slots.to(*args, **kwargs), self.n_source_tokens, self.span_lengths)

    def __repr__(self) -> str:
        return (
            f"Memory({self.n_source_tokens} tokens in {len(self.span_lengths)} spans -> {self.n_slots} slots, "
            f"{self.nbytes / 1024:.0f} KiB {str(self.slots.dtype).removeprefix('torch.')})"
        )
