"""`Memory`: a compressed context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from icae_fast.checks import is_int
from icae_fast.errors import InvalidInputError, NonFiniteError


def own_tensor(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor that holds its own elements only: x itself, or a copy of x if it is a part of a larger block."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.preserve_format)


@dataclass(frozen=True, eq=False)
class Memory:
    """The memory slots of one context, all its spans in order.

    A memory equals itself only, and can be a key of a dictionary; compare contents by `torch.equal(a.slots, b.slots)`.
    Copies and pickles (`copy.deepcopy`, `pickle`, `torch.save`) hold its own slots, even where these are a view.

    Args:
        slots: (n_spans * k, d) in the compute dtype; the decoder reads them in place of the text.
        n_source_tokens: number of tokens of the context.
        span_lengths: tokens of each span; their sum is `n_source_tokens`.
    """

    slots: torch.Tensor
    n_source_tokens: int
    span_lengths: tuple[int, ...]

    @property
    def n_slots(self) -> int:
        """Number of slots, which is the number of positions that the memory takes in the decoder."""
        return self.slots.shape[0]

    @property
    def memory_size(self) -> int:
        """k, slots per span."""
        return self.n_slots // len(self.span_lengths)

    @property
    def compression_ratio(self) -> float:
        """Context tokens per slot; below the configured rate where spans are short."""
        return self.n_source_tokens / self.n_slots

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self.slots.nbytes

    def spans(self) -> list[Memory]:
        """Return a memory for each span, in order, each with a copy of its slots."""
        parts = self.slots.split(self.memory_size)
        return [Memory(own_tensor(part), n, (n,)) for part, n in zip(parts, self.span_lengths, strict=True)]

    def to(self, *args: Any, **kwargs: Any) -> Memory:
        """Return a copy with the slots moved or cast by `torch.Tensor.to`."""
        return Memory(self.slots.to(*args, **kwargs), self.n_source_tokens, self.span_lengths)

    def __getstate__(self) -> dict[str, Any]:
        return _owned(vars(self))

    def __repr__(self) -> str:
        return (
            f"Memory({self.n_source_tokens} tokens in {len(self.span_lengths)} spans -> {self.n_slots} slots, "
            f"{self.nbytes / 1024:.0f} KiB {str(self.slots.dtype).removeprefix('torch.')})"
        )


@dataclass(frozen=True, eq=False)
class SlotKV:
    """The frozen decoder's keys and values of a memory's slots behind a given prefix.

    It equals itself only. Copies and pickles hold its own keys and values, even where these are views.

    Args:
        keys, values: (n_layers, n_slots, Hkv, D) in the compute dtype, with RoPE at positions from `start` on. Kernels
            read a head's keys contiguously, so the fast layout is `x.transpose(1, 2)` of a contiguous
            (n_layers, Hkv, n_slots, D); `ICAE.memory_kv` and `MemoryStore.get_kv` return it.
        prefix_ids: the tokens before the slots; through attention the values depend on all of them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    prefix_ids: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        """Position of the first slot."""
        return len(self.prefix_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def __getstate__(self) -> dict[str, Any]:
        return _owned(vars(self))

    def is_finite(self) -> bool:
        """Return whether keys and values hold neither NaN nor infinity; reads them once."""
        return all(bool(torch.isfinite(t).all()) for t in (self.keys, self.values))


def _owned(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: own_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in fields.items()}


def check_memory(memory: Memory, memory_size: int, hidden_size: int) -> None:
    """Raise unless a memory fits a model with k = `memory_size` and d = `hidden_size`.

    Raises:
        InvalidInputError: another type, or a memory with another k or d.
        NonFiniteError: its slots hold NaN or infinity.
    """
    if not isinstance(memory, Memory):
        raise InvalidInputError(f"expected one Memory and got {type(memory).__name__}; compress returns a list of them")
    shape = (len(memory.span_lengths) * memory_size, hidden_size)
    if memory.slots.shape != shape:
        raise InvalidInputError(
            f"the memory's slots are {tuple(memory.slots.shape)}, but {len(memory.span_lengths)} spans of this "
            f"model give {shape}; use the model that made the memory"
        )
    if not bool(torch.isfinite(memory.slots).all()):
        raise NonFiniteError("the memory's slots hold NaN or infinity; compress the context again")


def check_kv(kv: SlotKV, n_layers: int, n_slots: int, n_heads: int) -> None:
    """Raise unless keys and values fit `n_slots` slots of a model with `n_layers` layers and `n_heads` KV heads.

    Raises:
        InvalidInputError: another type, tensors of another shape or of two dtypes, or prefix ids that are no ids.
    """
    if not isinstance(kv, SlotKV):
        raise InvalidInputError(f"expected a SlotKV and got {type(kv).__name__}; ICAE.memory_kv returns one")
    found, wanted = tuple(kv.keys.shape), (n_layers, n_slots, n_heads)
    same = kv.values.shape == kv.keys.shape and kv.values.dtype == kv.keys.dtype
    if len(found) != 4 or found[:3] != wanted or not same or not kv.keys.is_floating_point():
        raise InvalidInputError(
            f"keys are {found} {kv.keys.dtype} and values {tuple(kv.values.shape)} {kv.values.dtype}; both must "
            f"have {n_layers} layers, {n_slots} slots, {n_heads} heads and the head size, in one floating dtype"
        )
    if not all(is_int(i) and i >= 0 for i in kv.prefix_ids):
        raise InvalidInputError(f"prefix_ids are {kv.prefix_ids!r}; give the ids of the tokens before the slots")
