"""Which rows of a call decode together, so that keys, values and logits stay within a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from icae_fast.core.memory import Memory

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore

# fp32 logits and the argmax's copy; sampling adds fp64 probabilities, their sums, and sorted scores with their ids.
_GREEDY_BYTES, _SAMPLING_BYTES = 8, 48


class DecoderRow(Protocol):
    """What a row reads and may write; see `icae_fast.generation.answers.Row`."""

    memory: Memory
    prefix: list[int]
    suffix: list[int]
    limit: int


def admitted(core: ICAECore, rows: Sequence[DecoderRow], *, sampling: bool) -> Iterator[list[int]]:
    """Yield the indices of rows that decode together, in order; a row over the budget is admitted by itself.

    A row takes keys and values of its prompt and of the most tokens it may write, its logits, and activations of its
    prompt. Prefix and slots of a memory are counted once for all rows of a group that read it.

    Args:
        core: the model, whose `decode_budget` counts.
        rows: all rows of a call.
        sampling: whether tokens are drawn.
    """
    b, itemsize, config = core.backbone, core.dtype.itemsize, core.base_model.config
    a_token = 2 * b.n_layers * b.num_kv_heads * b.head_dim * itemsize
    read = itemsize * (6 * b.hidden_size + 3 * config.intermediate_size + 2 * b.num_q_heads * b.head_dim)
    logits = core.vocabulary.n_base * (_SAMPLING_BYTES if sampling else _GREEDY_BYTES)
    group: list[int] = []
    total, shared = 0, set[tuple[int, tuple[int, ...]]]()
    for i, row in enumerate(rows):
        key = id(row.memory), tuple(row.prefix)
        of_memory = (len(row.prefix) + row.memory.n_slots) * a_token
        own = (len(row.suffix) + row.limit) * a_token + len(row.suffix) * read + logits
        if group and total + own + (0 if key in shared else of_memory) > core.decode_budget:
            yield group
            group, total = [], 0
            shared.clear()
        total += own + (0 if key in shared else of_memory)
        shared.add(key)
        group.append(i)
    if group:
        yield group
