"""What all measurements of a run share: texts, sizes, seed, and the cache of what was computed before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from icae_fast.backbone.rows import micro_batches
from icae_fast.errors import ContextTooLongError, DataError
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.texts.passages import Excerpt, Texts

BATCH_TOKENS = 8192  # positions of rows that are read, or written, together
FEWEST_PASSAGES = 8  # of a row whose passages are far longer than a span

Item = TypeVar("Item")


class Cache(Protocol):
    """Values by key that outlive an interrupted run; `icae_fast.training.evaluation.cache.AnswerCache` is one."""

    def get(self, key: str) -> Any | None:
        """The JSON value that was put under a key, None if there is none."""

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value."""


class NoCache:
    """Keeps nothing."""

    def get(self, key: str) -> None:
        """None."""

    def put(self, key: str, value: Any) -> None:
        """Does nothing."""


@dataclass
class Workbench:
    """What measurements are made with.

    Args:
        texts: passages are drawn from them.
        cache: what was computed is kept there, and not computed again.
        samples: passages for each row of a table; see `affordable` for those beyond a span.
        seed: of all that is drawn.
        on_progress: called with (what is done, items done, of how many).
    """

    texts: Texts
    cache: Cache = field(default_factory=NoCache)
    samples: int = 32
    seed: int = 0
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None

    def draw(self, subject: Subject, n_tokens: int, following: int = 0, count: int | None = None) -> list[Excerpt]:
        """Passages in a subject's tokens; see `Texts.draw`."""
        count = self.samples if count is None else count
        return self.texts.draw(subject.icae.tokenizer, n_tokens, count, self.seed, following)

    def affordable(self, subjects: Sequence[Subject], n_tokens: int) -> int:
        """How many passages of a length are restored: `samples` up to the longest full span of the subjects.

        Beyond it as many as make `samples` such spans, so that no row of a table takes much longer than another, but
        not under `FEWEST_PASSAGES`. Subjects side by side have the same passages.
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
        """A JSON value for each item, from the cache or computed in batches.

        Which items make a batch does not depend on the cache, since in bf16 an item's rounding may depend on its
        company: an interrupted run that goes on gives what one that was not interrupted gives.

        Args:
            what: shown while it runs.
            items: what values are of.
            keys: under which each value is kept.
            costs: positions that each takes, by which batches are cut.
            run: gives the values of a batch.
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
    """The rows of a table as they come, and the cases that texts or positions do not allow.

    Attributes:
        rows: cells by column.
        samples: records of single passages.
        skipped: a sentence for each case that has no row.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Within it, texts that are too short, or a model's lack of positions, are noted and end the case alone."""
        try:
            yield
        except (DataError, ContextTooLongError) as error:
            self.skipped.append(f"{name}: {error}")

    def add(self, row: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
        """A row, and the records behind it."""
        self.rows.append(row)
        self.samples += samples

    def check(self) -> None:
        """Raise unless there is a row.

        Raises:
            DataError: there is none; says why for every case.
        """
        if not self.rows:
            raise DataError("; ".join(self.skipped) or "nothing was asked for")
