"""`Memory`: a compressed context."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icae_fast.core.inputs import is_int
from icae_fast.errors import InvalidInputError, NonFiniteError


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

    def spans(self) -> list[Memory]:
        """The memory of each span by itself, in order; the slots are views of these."""
        parts = self.slots.split(self.memory_size)
        return [Memory(part, n, (n,)) for part, n in zip(parts, self.span_lengths, strict=True)]

    def to(self, *args, **kwargs) -> Memory:
        """A copy with the slots moved or cast by `torch.Tensor.to`."""
        return Memory(self.slots.to(*args, **kwargs), self.n_source_tokens, self.span_lengths)

    def __repr__(self) -> str:
        return (
            f"Memory({self.n_source_tokens} tokens in {len(self.span_lengths)} spans -> {self.n_slots} slots, "
            f"{self.nbytes / 1024:.0f} KiB {str(self.slots.dtype).removeprefix('torch.')})"
        )


@dataclass(frozen=True)
class SlotKV:
    """Keys and values that the frozen decoder has for a memory's slots behind a certain prefix.

    Args:
        keys, values: (n_layers, n_slots, Hkv, D) in the model's dtype, rotated to positions from `start` on. Kernels
            like a head's side by side in memory, as they are in `x.transpose(1, 2)` of a contiguous
            (n_layers, Hkv, n_slots, D); `ICAE.memory_kv` and `MemoryStore.get_kv` give them so.
        prefix_ids: the tokens that stand before the slots; attention makes the values depend on all of them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    prefix_ids: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        """The position of the first slot."""
        return len(self.prefix_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def is_finite(self) -> bool:
        """Whether there is neither NaN nor infinity in them; reads them once."""
        return all(bool(torch.isfinite(t).all()) for t in (self.keys, self.values))


def check_memory(memory: Memory, memory_size: int, hidden_size: int) -> None:
    """Raise unless a memory can be one of a model with k = `memory_size` and d = `hidden_size`.

    Raises:
        InvalidInputError: no memory, or one with another k or d.
        NonFiniteError: its slots hold NaN or infinity.
    """
    if not isinstance(memory, Memory):
        raise InvalidInputError(f"expected one Memory and got {type(memory).__name__}; compress gives a list of them")
    shape = (len(memory.span_lengths) * memory_size, hidden_size)
    if memory.slots.shape != shape:
        raise InvalidInputError(
            f"the memory's slots are {tuple(memory.slots.shape)}, but {len(memory.span_lengths)} spans of this "
            f"model give {shape}; use the model that made the memory"
        )
    if not bool(torch.isfinite(memory.slots).all()):
        raise NonFiniteError("the memory's slots hold NaN or infinity; compress the context again")


def check_kv(kv: SlotKV, n_layers: int, n_slots: int, n_heads: int) -> None:
    """Raise unless keys and values can be those of `n_slots` slots in a model with so many layers and K/V heads.

    Raises:
        InvalidInputError: no `SlotKV`, tensors of another shape or of two dtypes, or a prefix that is no ids.
    """
    if not isinstance(kv, SlotKV):
        raise InvalidInputError(f"expected a SlotKV and got {type(kv).__name__}; ICAE.memory_kv gives one")
    found, wanted = tuple(kv.keys.shape), (n_layers, n_slots, n_heads)
    same = kv.values.shape == kv.keys.shape and kv.values.dtype == kv.keys.dtype
    if len(found) != 4 or found[:3] != wanted or not same or not kv.keys.is_floating_point():
        raise InvalidInputError(
            f"keys are {found} {kv.keys.dtype} and values {tuple(kv.values.shape)} {kv.values.dtype}; both have to "
            f"be {n_layers} layers, {n_slots} slots, {n_heads} heads and the head size, of one floating dtype"
        )
    if not all(is_int(i) and i >= 0 for i in kv.prefix_ids):
        raise InvalidInputError(f"prefix_ids are {kv.prefix_ids!r}; give the ids of the tokens before the slots")
