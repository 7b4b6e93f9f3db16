"""The state that all measurements of a run share: texts, sizes, seed, and the cache of computed values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from icae_fast.backbone.rows import micro_batches
from icae_fast.errors import ContextTooLongError, DataError
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.texts.passages import Excerpt, Texts

BATCH_TOKENS = 8192  # positions of a batch
FEWEST_PASSAGES = 8  # minimum passages of a row whose passages are far longer than a span

Item = TypeVar("Item")


class Cache(Protocol):
    """A persistent key-value cache; `icae_fast.training.evaluation.cache.AnswerCache` is one."""

    def get(self, key: str) -> Any | None:
        """Return the JSON value under a key, None if there is none."""

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value."""


class NoCache:
    """A cache that is always empty."""

    def get(self, key: str) -> None:
        """Return None."""

    def put(self, key: str, value: Any) -> None:
        """Do nothing."""


@dataclass
class Workbench:
    """Texts, cache and settings of a run.

    Args:
        texts: texts that passages are drawn from.
        cache: computed values are kept there and not computed again.
        samples: passages per row of a table; `affordable` limits passages longer than a span.
        seed: seed for all random draws.
        on_progress: called with (current task, items done, items in total).
    """

    texts: Texts
    cache: Cache = field(default_factory=NoCache)
    samples: int = 32
    seed: int = 0
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None

    def draw(self, subject: Subject, n_tokens: int, following: int = 0, count: int | None = None) -> list[Excerpt]:
        """Draw passages in a subject's tokens; see `Texts.draw`."""
        count = self.samples if count is None else count
        return self.texts.draw(subject.icae.tokenizer, n_tokens, count, self.seed, following)

    def affordable(self, subjects: Sequence[Subject], n_tokens: int) -> int:
        """Return how many passages of a length are restored: `samples` up to the longest full span of the subjects.

        For longer passages it is the number that adds up to `samples` such spans, at least `FEWEST_PASSAGES`, so that
        no row of a table takes much longer than another. Subjects that are compared use the same passages.

        Args:
            subjects: the compared subjects.
            n_tokens: length of a passage.
        """
        longest = max(subject.span_tokens for subject in subjects)
        return min(self.samples, max(FEWEST_PASSAGES, self.samples * longest // n_tokens))

    def compute(
        self,
        what: str,
        items: Sequence[Item],
        keys: Sequence[str],
        costs: Sequence[int],
        run: Callable[[Sequence[Item]], list[Any]],
    ) -> list[Any]:
        """Return a JSON value for each item, from the cache or computed in batches.

        Batches do not depend on the cache, since in bf16 an item's rounding may depend on the rest of its batch. A
        resumed run therefore returns the same values as an uninterrupted one.

        Args:
            what: name of the task for `on_progress`.
            items: inputs.
            keys: cache key of each item.
            costs: positions of each item, by which batches are cut.
            run: returns the values of a batch.
        """
        values: list[Any] = []
        self.on_progress(what, 0, len(items))
        for batch in micro_batches(costs, BATCH_TOKENS):
            kept = [self.cache.get(keys[i]) for i in batch]
            if any(value is None for value in kept):
                kept = run([items[i] for i in batch])
                for i, value in zip(batch, kept, strict=True):
                    self.cache.put(keys[i], value)
            values += kept
            self.on_progress(what, len(values), len(items))
        return values


@dataclass
class Cases:
    """The collected rows of a table, and the cases that had to be skipped.

    Args:
        rows: cells by column.
        samples: records of single passages.
        skipped: a sentence for each case without a row.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Skip the rest of the block, with a note, if texts are too short or the model has too few positions."""
        try:
            yield
        except (DataError, ContextTooLongError) as error:
            self.skipped.append(f"{name}: {error}")

    def add(self, row: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
        """Add a row and its records."""
        self.rows.append(row)
        self.samples += samples

    def check(self) -> None:
        """Raise unless there is a row.

        Raises:
            DataError: there is none; the message holds the reason of every case.
        """
        if not self.rows:
            raise DataError("; ".join(self.skipped) or "there is nothing to measure; give lengths or sizes")
