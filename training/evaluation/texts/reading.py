"""What a decoder makes of slots and of text: contexts restored greedily, and losses under teacher forcing."""

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

# Of a continuation the first tokens are not scored, as in training: with nothing before them they can only be guessed.
UNSCORED = LEAVE_TOKENS_FOR_LM


@dataclass(frozen=True)
class Scores:
    """Sums over scored tokens.

    Args:
        loss: sum of cross-entropies, nats.
        correct: how many had the highest logit.
        count: how many there are.
    """

    loss: float
    correct: int
    count: int

    @property
    def mean_loss(self) -> float:
        """Nats a token."""
        return self.loss / self.count

    @property
    def accuracy(self) -> float:
        """Share of correct tokens."""
        return self.correct / self.count

    @classmethod
    def total(cls, scores: Iterable[Scores]) -> Scores:
        """The sum of several."""
        listed = list(scores)
        return cls(*(sum(getattr(s, name) for s in listed) for name in ("loss", "correct", "count")))


def restored_ids(
    subject: Subject, rows: Sequence[list[int]], bench: Workbench, by_span: bool = False
) -> list[list[int]]:
    """Contexts compressed and written out greedily from their slots alone, without what ends them.

    Args:
        subject: whose decoder writes.
        rows: ids of contexts.
        bench: keeps what was written.
        by_span: each span behind its own slots alone, see `ICAE.restore_by_span`; else behind all of them.

    Raises:
        ContextTooLongError: the slots leave no position to write at.
    """
    icae = subject.icae

    def run(batch: Sequence[list[int]]) -> list[list[int]]:
        restore = icae.restore_by_span if by_span else icae.restore
        written = restore(icae.compress(list(batch)), return_ids=True)
        icae.clear_kv()  # nothing is read twice
        return [[int(i) for i in ids if int(i) not in icae.eos_token_ids] for ids in written]

    what = "restored by span" if by_span else "restored"
    keys = [subject.key(row, what) for row in rows]
    costs = [subject.n_slots(len(row)) + len(row) for row in rows]  # of decoding: it takes the time
    return bench.compute(f"{subject.name}: restoring", rows, keys, costs, run)


def restoration_scores(subject: Subject, rows: Sequence[list[int]], bench: Workbench) -> list[Scores]:
    """Teacher-forced scores of each context behind its own slots; EOS behind it does not count.

    Raises:
        ContextTooLongError: a context and its slots pass the model's positions.
    """
    samples = [autoencoding_sample(subject.icae, row) for row in rows]
    keys = [subject.key(row, "restoration scores") for row in rows]
    return _scores(subject, "scoring", samples, keys, bench, ends=1)


def slot_scores(
    subject: Subject, contexts: Sequence[list[int]], continuations: Sequence[list[int]], bench: Workbench
) -> list[Scores]:
    """Scores of each continuation behind the slots of its context, but for its first `UNSCORED` tokens.

    Raises:
        ContextTooLongError: slots and continuation pass the model's positions.
    """
    pairs = list(zip(contexts, continuations, strict=True))
    samples = [continuation_sample(subject.icae, *pair, leave=UNSCORED) for pair in pairs]
    keys = [subject.key(context, "continuation", following, UNSCORED) for context, following in pairs]
    return _scores(subject, "continuing slots", samples, keys, bench)


def text_scores(
    subject: Subject, contexts: Sequence[list[int]], continuations: Sequence[list[int]], bench: Workbench
) -> list[Scores]:
    """Scores that the base model gives each continuation behind text, the same tokens as `slot_scores`.

    Args:
        subject: whose base model reads.
        contexts: ids, which may be none.
        continuations: ids.
        bench: keeps the scores.
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
    """Scores of the labelled tokens of samples, the last `ends` of each left out."""

    def run(batch: Sequence[Sample]) -> list[list[Any]]:
        rows = [
            [torch.tensor(getattr(s, name)) for s in batch] for name in ("input_ids", "prompt_answer_ids", "labels")
        ]
        with torch.no_grad():
            found = subject.icae.token_losses(*rows)
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
    """[sum of losses, correct, count] of each row, without its last `ends` tokens."""
    found, starts = [], [0, *itertools.accumulate(counts)]
    for start, end in itertools.pairwise(starts):
        chosen = slice(start, end - ends)
        found.append([float(losses[chosen].double().sum()), int(correct[chosen].sum()), end - ends - start])
    return found
