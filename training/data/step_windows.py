"""Windows of optimiser steps, whose samples are drawn and packed together."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from icae_fast.errors import DataError
from icae_fast.training.data import packing
from icae_fast.training.data.rows import MappedSource, Row, StreamedSource
from icae_fast.training.data.samples import SKIPPED, Draft, Draw
from icae_fast.training.data.tally import Tally
from icae_fast.training.methods.curriculum import Curriculum, Stage


@dataclass(frozen=True)
class StepWindow:
    """Consecutive optimiser steps of one stage.

    Args:
        begin, end: positions between windows, in JSON values: `step`, the number of the next optimiser step; `epoch`
            and `rows`, the position of the next row (see `RowIterator.state_dict`, None for the first); `used`, how
            many of that row's samples are in earlier windows; `counts` of the tally at this position.
        stage: stage of all steps.
        drafts: the samples.
        steps: micro-batches of indices into `drafts`, for each step.
    """

    begin: dict[str, Any]
    end: dict[str, Any]
    stage: Stage
    drafts: list[Draft]
    steps: list[packing.Step]


@dataclass
class _Pulled:
    """A row's samples.

    Args:
        place: position before the row.
        drafts: the samples.
        used: number of first samples that are in earlier windows.
    """

    place: dict[str, Any]
    drafts: list[Draft]
    used: int = 0


def draw_row(draw: Draw, row: Row, stage: Stage, seed: int, epoch: int, tally: Tally) -> list[Draft]:
    """Return the samples of a row, drawn with a random generator for this row and epoch."""
    if row.problem:
        if epoch == 0:  # later epochs see the same row
            tally.add(f"{SKIPPED}: {row.problem}", row.origin)
        return []
    return draw(row, stage, random.Random(f"{seed}:{epoch}:{row.key}"), tally)


class StepWindowMaker:
    """A maker of consecutive windows, from any position on.

    Args:
        source, draw, curriculum, tokens_per_step, micro_batch_tokens, window_steps, seed: see `BatchStream`.
        begin: position of the first window; see `StepWindow`.
        micro_batches_per_step: micro-batches of a step over all processes.
        quiet: count bad rows without logging them.

    Attributes:
        tally: counts of all rows so far.
    """

    def __init__(
        self,
        source: MappedSource | StreamedSource,
        draw: Draw,
        curriculum: Curriculum,
        begin: Mapping[str, Any],
        *,
        tokens_per_step: int,
        micro_batches_per_step: int,
        micro_batch_tokens: int,
        window_steps: int,
        seed: int,
        quiet: bool,
    ) -> None:
        self._source, self._draw, self._curriculum, self._seed = source, draw, curriculum, seed
        self._tokens_per_step, self._per_step = tokens_per_step, micro_batches_per_step
        self._budget, self._window_steps = micro_batch_tokens, window_steps
        self.tally = Tally(quiet=quiet)
        self._go_to(begin)

    def _go_to(self, begin: Mapping[str, Any]) -> None:
        """Move to a position, dropping all pulled samples."""
        self._begin = dict(begin)
        self._epoch = begin["epoch"]
        self._rows = self._source.rows(self._epoch)
        if begin["rows"] is not None:
            self._rows.load_state_dict(begin["rows"])
        # Whether this epoch was read from its first row on, and whether it has had a sample.
        self._whole, self._fruitful = begin["rows"] is None, False
        self._used = begin["used"]
        self.tally.counts = Counter(begin["counts"])
        self._pulled: deque[_Pulled] = deque()

    def next_window(self) -> StepWindow:
        """Return the next window.

        Raises:
            DataError: a row or file cannot be used, or no row of an epoch has a sample.
        """
        begin, step = self._begin, self._begin["step"]
        _, stage = self._curriculum.stage_at(step)
        n_steps = min(self._window_steps, self._curriculum.ends(step) - step)
        drafts = self._take(stage, n_steps)
        costs = [draft.cost for draft in drafts]
        rng = random.Random(f"{self._seed}:steps from {step}")
        steps = packing.pack_steps(costs, n_steps, self._per_step, self._budget, rng)
        next_step = step + n_steps
        if next_step == self._curriculum.ends(step):
            # The unused samples of this row were drawn for the stage that ends here.
            if self._pulled and self._pulled[0].used:
                self._pulled.popleft()
            end = self._place(next_step)
            self._go_to(end)
        else:
            end = self._begin = self._place(next_step)
        return StepWindow(begin, end, stage, drafts, steps)

    def _take(self, stage: Stage, n_steps: int) -> list[Draft]:
        """Return the samples of a window, in the order of their rows; those that do not fit are kept for the next."""
        n_batches, n_tokens = n_steps * self._per_step, n_steps * self._tokens_per_step
        drafts = [draft for pulled in self._pulled for draft in pulled.drafts[pulled.used :]]
        total = sum(draft.cost for draft in drafts)
        while total < n_tokens or len(drafts) < n_batches:
            new = self._pull(stage)
            drafts += new
            total += sum(draft.cost for draft in new)
        costs = [draft.cost for draft in drafts]
        enough = next(n for n, tokens in enumerate(accumulate(costs), 1) if tokens >= n_tokens)
        n_taken = packing.count_fitting(costs[: max(enough, n_batches)], n_batches, self._budget)
        left = n_taken
        while self._pulled and left >= len(self._pulled[0].drafts) - self._pulled[0].used:
            first = self._pulled.popleft()
            left -= len(first.drafts) - first.used
        if left:
            self._pulled[0].used += left
        return drafts[:n_taken]

    def _pull(self, stage: Stage) -> list[Draft]:
        """Return the unused samples of the next row, possibly none."""
        place = self._row_place()
        row = next(self._rows, None)
        if row is None:
            if self._whole and not self._fruitful:
                raise DataError(f"no row of the data yields a sample; rows by cause: {dict(self.tally.counts)}")
            self._epoch += 1
            self._rows = self._source.rows(self._epoch)
            self._whole, self._fruitful = True, False
            return []
        drafts = draw_row(self._draw, row, stage, self._seed, self._epoch, self.tally)
        self._fruitful = self._fruitful or bool(drafts)
        pulled = _Pulled(place, drafts, min(self._used, len(drafts)))
        self._used = 0
        self._pulled.append(pulled)
        return pulled.drafts[pulled.used :]

    def _row_place(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "rows": self._rows.state_dict(), "counts": dict(self.tally.counts)}

    def _place(self, step: int) -> dict[str, Any]:
        """Return the position before the first unused sample."""
        first = self._pulled[0] if self._pulled else _Pulled(self._row_place(), [])
        return {"step": step, **first.place, "used": first.used}
