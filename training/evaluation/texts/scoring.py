"""Restored contexts and teacher-forced scores, from slots and from text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from icae_fast import ICAE
from icae_fast.step.head_loss import head_loss
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.workbench import Workbench
from icae_fast.training.methods.distill import TeacherRows, teacher_hidden
from icae_fast.training.methods.objectives import LEAVE_TOKENS_FOR_LM, Sample, autoencoding_sample, continuation_sample

# The first tokens of a continuation are not scored, as in training, because without a context they are mere guesses.
UNSCORED = LEAVE_TOKENS_FOR_LM


@dataclass(frozen=True)
class Scores:
    """Sums over scored tokens.

    Args:
        loss: sum of cross-entropies, nats.
        correct: number of tokens that were the argmax.
        count: number of scored tokens.
    """

    loss: float
    correct: int
    count: int

    @property
    def mean_loss(self) -> float:
        """Mean loss, nats per token."""
        return self.loss / self.count

    @property
    def accuracy(self) -> float:
        """Share of correct tokens."""
        return self.correct / self.count

    @classmethod
    def total(cls, scores: Iterable[Scores]) -> Scores:
        """Return the sum of several scores."""
        listed = list(scores)
        return cls(*(sum(getattr(s, name) for s in listed) for name in ("loss", "correct", "count")))


def restored_ids(
    subject: Subject, rows: Sequence[list[int]], bench: Workbench, by_span: bool = False
) -> list[list[int]]:
    """Compress contexts and restore them greedily from their slots; return ids without end-of-sequence tokens.

    Args:
        subject: the adapter.
        rows: ids of the contexts.
        bench: caches restored ids.
        by_span: restore each span from its own slots (`ICAE.restore_by_span`) instead of from all of them.

    Raises:
        ContextTooLongError: the slots leave no positions for the text.
    """
    icae = subject.icae

    def run(batch: Sequence[list[int]]) -> list[list[int]]:
        restore = icae.restore_by_span if by_span else icae.restore
        written = restore(icae.compress(list(batch)), return_ids=True)
        icae.clear_kv()  # no slots are read twice
        return [[int(i) for i in ids if int(i) not in icae.eos_token_ids] for ids in written]

    what = "restored by span" if by_span else "restored"
    keys = [subject.key(row, what) for row in rows]
    costs = [subject.n_slots(len(row)) + len(row) for row in rows]  # decoding takes most of the time
    return bench.compute(f"{subject.name}: restoring", rows, keys, costs, run)


def restoration_scores(subject: Subject, rows: Sequence[list[int]], bench: Workbench) -> list[Scores]:
    """Return the teacher-forced scores of each context after its slots, without the final end-of-sequence token.

    Args:
        subject: the adapter.
        rows: ids of the contexts.
        bench: caches scores.

    Raises:
        ContextTooLongError: a context and its slots do not fit into the model's positions.
    """
    samples = [autoencoding_sample(subject.icae, row) for row in rows]
    keys = [subject.key(row, "restoration scores") for row in rows]
    return _scores(subject, "scoring", samples, keys, bench, ends=1)


def slot_scores(
    subject: Subject, contexts: Sequence[list[int]], continuations: Sequence[list[int]], bench: Workbench
) -> list[Scores]:
    """Return the scores of each continuation after the slots of its context, without its first `UNSCORED` tokens.

    Args:
        subject: the adapter.
        contexts, continuations: ids.
        bench: caches scores.

    Raises:
        ContextTooLongError: slots and continuation do not fit into the model's positions.
    """
    pairs = list(zip(contexts, continuations, strict=True))
    samples = [continuation_sample(subject.icae, *pair, leave=UNSCORED) for pair in pairs]
    keys = [subject.key(context, "continuation", following, UNSCORED) for context, following in pairs]
    return _scores(subject, "continuing slots", samples, keys, bench)


def text_scores(
    subject: Subject, contexts: Sequence[list[int]], continuations: Sequence[list[int]], bench: Workbench
) -> list[Scores]:
    """Return the base model's scores of each continuation after text, for the same tokens as `slot_scores`.

    Args:
        subject: its base model is scored.
        contexts: ids; may be empty.
        continuations: ids.
        bench: caches scores.
    """
    pairs = list(zip(contexts, continuations, strict=True))
    keys = [subject.base_key("text", *pair, UNSCORED) for pair in pairs]
    costs = [len(context) + len(following) for context, following in pairs]
    values = bench.compute(
        f"{subject.name}: reading text", pairs, keys, costs, lambda batch: _base_scores(subject.icae, batch)
    )
    return [Scores(*value) for value in values]


def _scores(
    subject: Subject, what: str, samples: list[Sample], keys: list[str], bench: Workbench, ends: int = 0
) -> list[Scores]:
    """Return the scores of the labelled tokens of samples, without the last `ends` of each."""

    def run(batch: Sequence[Sample]) -> list[list[Any]]:
        contexts, prompts, labels = (
            [torch.tensor(getattr(s, name)) for s in batch] for name in ("input_ids", "prompt_answer_ids", "labels")
        )
        with torch.no_grad():
            found = subject.icae.token_losses(contexts, prompts, labels)
        return _by_row(found.losses, found.correct, [s.n_labels for s in batch], ends)

    values = bench.compute(f"{subject.name}: {what}", samples, keys, [s.n_tokens for s in samples], run)
    return [Scores(*value) for value in values]


@torch.no_grad()
def _base_scores(icae: ICAE, batch: Sequence[tuple[list[int], list[int]]]) -> list[list[Any]]:
    rows = [torch.tensor(context + following) for context, following in batch]
    firsts = [len(context) + UNSCORED for context, _ in batch]
    wanted = [torch.arange(first - 1, len(row) - 1) for first, row in zip(firsts, rows, strict=True)]
    counts = [len(w) for w in wanted]
    ids = [row[:-1] for row in rows]
    hidden = teacher_hidden(icae, TeacherRows(ids, wanted, torch.ones(sum(counts), dtype=torch.bool), 0))
    targets = torch.cat([row[first:] for first, row in zip(firsts, rows, strict=True)]).to(icae.device)
    head = icae.base_model.lm_head
    return _by_row(*head_loss(hidden, head.weight, targets, bias=head.bias), counts, 0)


def _by_row(losses: torch.Tensor, correct: torch.Tensor, counts: list[int], ends: int) -> list[list[Any]]:
    """Return [sum of losses, correct, count] of each row, without its last `ends` tokens."""
    found, starts = [], [0, *itertools.accumulate(counts)]
    for start, end in itertools.pairwise(starts):
        chosen = slice(start, end - ends)
        found.append([float(losses[chosen].double().sum()), int(correct[chosen].sum()), end - ends - start])
    return found
