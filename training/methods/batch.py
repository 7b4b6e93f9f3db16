"""Batches as the model takes them: rows of any lengths one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from icae_fast.errors import InvalidInputError
from icae_fast.training.methods.objectives import OBJECTIVES, Sample

Batch = dict[str, "torch.Tensor | list[str]"]


def pack(samples: Sequence[Sample]) -> Batch:
    """One batch of samples.

    Args:
        samples: at least one.

    Returns:
        `context_ids` (C,), `prompt_answer_ids` (P,) and `labels` (P,) of all rows one behind the other;
        `context_lengths`, `prompt_lengths` and `objectives` (B,), the last as indices into
        `icae_fast.training.methods.objectives.OBJECTIVES`; all int64. `origins`: a string for each row. `own_tokens`
        (P,) bool, where
        samples have them.

    Raises:
        InvalidInputError: there is no sample.
    """
    if not samples:
        raise InvalidInputError("a batch needs at least one sample")

    def packed(rows):
        return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)

    own = {}
    if any(s.own_tokens for s in samples):
        marks = (s.own_tokens or [False] * len(s.prompt_answer_ids) for s in samples)
        own = {"own_tokens": torch.tensor(list(chain.from_iterable(marks)))}
    return own | {
        "context_ids": packed(s.input_ids for s in samples),
        "context_lengths": torch.tensor([len(s.input_ids) for s in samples]),
        "prompt_answer_ids": packed(s.prompt_answer_ids for s in samples),
        "prompt_lengths": torch.tensor([len(s.prompt_answer_ids) for s in samples]),
        "labels": packed(s.labels for s in samples),
        "objectives": torch.tensor([OBJECTIVES.index(s.objective) for s in samples]),
        "origins": [s.origin for s in samples],
    }
