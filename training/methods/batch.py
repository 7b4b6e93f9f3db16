"""Batches: samples of any lengths packed row after row, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from icae_fast.errors import InvalidInputError
from icae_fast.training.methods.objectives import Objective, Sample


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed samples in host memory.

    The layout of a step (where spans begin, which positions carry a label) is computed on the host from these ids, and
    the model copies the ids to its device once. `Trainer` and DDP move tensors, and containers of tensors, to the
    device before the forward; they leave an object of this class as it is.

    Args:
        context_ids: (C,) int64 context ids of all rows.
        context_lengths: context tokens of each row.
        prompt_answer_ids: (P,) int64 decoder ids of all rows, with a memory id for each slot.
        prompt_lengths: ids that the decoder reads in each row.
        labels: (P,) int64, -100 where there is nothing to learn.
        objectives: objective of each row.
        origins: provenance of each row, for messages: "books.jsonl:17".
        own_tokens: (P,) bool, True where the decoder reads its own guess; see
            `icae_fast.training.methods.objectives.with_own_tokens`. Default None: nowhere.
        memory_size: slots per span, the first k' of the adapter's k. Default None: k.
    """

    context_ids: torch.Tensor
    context_lengths: list[int]
    prompt_answer_ids: torch.Tensor
    prompt_lengths: list[int]
    labels: torch.Tensor
    objectives: list[Objective]
    origins: list[str]
    own_tokens: torch.Tensor | None = None
    memory_size: int | None = None

    @property
    def contexts(self) -> tuple[torch.Tensor, ...]:
        """(L_i,) context ids of each row, views of `context_ids`."""
        return self.context_ids.split(self.context_lengths)

    @property
    def prompts(self) -> tuple[torch.Tensor, ...]:
        """(P_i,) decoder ids of each row, views of `prompt_answer_ids`."""
        return self.prompt_answer_ids.split(self.prompt_lengths)

    @property
    def label_rows(self) -> tuple[torch.Tensor, ...]:
        """(P_i,) labels of each row, views of `labels`."""
        return self.labels.split(self.prompt_lengths)

    @property
    def n_tokens(self) -> int:
        """Context and decoder tokens of all rows."""
        return len(self.context_ids) + len(self.prompt_answer_ids)


def pack(samples: Sequence[Sample], memory_size: int | None = None) -> Batch:
    """Pack samples into one batch.

    Args:
        samples: at least one.
        memory_size: slots per span that the samples were made for, default the adapter's k.

    Raises:
        InvalidInputError: there is no sample.
    """
    if not samples:
        raise InvalidInputError("a batch needs at least one sample")
    own = None
    if any(s.own_tokens for s in samples):
        marks = (s.own_tokens or [False] * len(s.prompt_answer_ids) for s in samples)
        own = torch.tensor(list(chain.from_iterable(marks)))
    return Batch(
        context_ids=_packed(s.input_ids for s in samples),
        context_lengths=[len(s.input_ids) for s in samples],
        prompt_answer_ids=_packed(s.prompt_answer_ids for s in samples),
        prompt_lengths=[len(s.prompt_answer_ids) for s in samples],
        labels=_packed(s.labels for s in samples),
        objectives=[s.objective for s in samples],
        origins=[s.origin for s in samples],
        own_tokens=own,
        memory_size=memory_size,
    )


def _packed(rows: Iterable[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
