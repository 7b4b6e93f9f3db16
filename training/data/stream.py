"""The micro-batches of a training run, in order, starting at any position.

The samples of a window of optimiser steps are drawn, sorted and packed together (`icae_fast.training.data.packing`);
samples that do not fit begin the next window. Everything is a function of the data, the settings, the seed and the
window's position in the data. So a position is enough to resume, and each process finds its own part without
communication.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from icae_fast.backbone.rows import micro_batches
from icae_fast.errors import ConfigError, DataError
from icae_fast.training.data import packing
from icae_fast.training.data.rows import MappedSource, StreamedSource
from icae_fast.training.data.samples import SKIPPED, Draw
from icae_fast.training.data.step_windows import StepWindow, StepWindowMaker, draw_row
from icae_fast.training.data.tally import Tally
from icae_fast.training.methods.curriculum import Curriculum, Stage
from icae_fast.training.methods.objectives import Sample, with_memory_size, with_own_tokens, with_wrong_tokens

STATE_VERSION = 1


class MicroBatch(list[Sample]):
    """Samples of one forward.

    Attributes:
        step: optimiser step of the samples, from 0.
        memory_size: slots per span, drawn from the stage's `memory_sizes`; None for the adapter's k.
        state: state of the stream after them, for `BatchStream.load_state_dict`.
    """

    def __init__(self, samples: list[Sample], step: int, memory_size: int | None, state: dict[str, Any]) -> None:
        super().__init__(samples)
        self.step = step
        self.memory_size = memory_size
        self.state = state


class BatchStream(IterableDataset):
    """The micro-batches of one process, in the order of the optimiser steps, without end.

    Each optimiser step has about `tokens_per_step` tokens over all processes (`Sample.n_tokens`), in
    `micro_batches_per_step` micro-batches per process. The samples of a step do not depend on the number of processes,
    as long as the total number of micro-batches is the same. Every process draws all samples and builds only its own.

    Args:
        source: rows; see `icae_fast.training.data.sources.open_source`.
        draw: draws the samples of a row; see `icae_fast.training.data.samples`.
        curriculum: stages of the run.
        tokens_per_step: tokens of an optimiser step over all processes.
        micro_batch_tokens: tokens of a micro-batch, at most; a larger sample has a micro-batch to itself.
        rank: rank of this process, default 0; only rank 0 logs.
        world_size: number of processes, default 1.
        seed: seed for all random draws, default 0.
        window_steps: optimiser steps that are sorted and shuffled together, default 16. A window ends with its stage.

    Attributes:
        micro_batches_per_step: micro-batches of this process in a step.

    Raises:
        ConfigError: an option is out of range, the draw requires other rows, or a stage cannot be drawn.

    Example:
        ```python
        source = open_source("books/*.jsonl", icae.tokenizer, fragment_tokens=512)
        draw = PretrainingDraw(icae)
        stream = BatchStream(source, draw, curriculum, tokens_per_step=65_536, micro_batch_tokens=8_192)
        for batch in stream.loader(pack):
            ...
        ```
    """

    def __init__(
        self,
        source: MappedSource | StreamedSource,
        draw: Draw,
        curriculum: Curriculum,
        *,
        tokens_per_step: int,
        micro_batch_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        window_steps: int = 16,
    ) -> None:
        super().__init__()
        sizes = {"tokens_per_step": tokens_per_step, "micro_batch_tokens": micro_batch_tokens,
                 "window_steps": window_steps, "world_size": world_size}  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; it must be 0 to {world_size - 1}")
        if source.fields != draw.fields:
            raise ConfigError(f"the rows have {', '.join(source.fields)}, but samples need {', '.join(draw.fields)}")
        for i, stage in enumerate(curriculum.stages):
            try:
                stage.check(draw.layout.config)
                draw.check(stage)
            except ConfigError as error:
                raise ConfigError(f"stage {i}: {error}") from error
        self.source, self.draw, self.curriculum = source, draw, curriculum
        self.rank, self.world_size, self.seed, self.window_steps = rank, world_size, seed, window_steps
        self.micro_batch_tokens = micro_batch_tokens
        self.tokens_per_step = tokens_per_step
        self._per_step = packing.count_micro_batches(tokens_per_step, micro_batch_tokens, world_size)
        self.micro_batches_per_step = self._per_step // world_size
        tally = Tally(quiet=rank > 0)
        for origin, problem in source.bad_rows:
            tally.add(f"{SKIPPED}: {problem}", origin)
        begin = {"epoch": 0, "rows": None, "used": 0, "counts": dict(tally.counts)}
        self._state: dict[str, Any] = {
            "begin": {"step": 0, **begin}, "steps": 0, "micro_batches": 0, "counts": dict(tally.counts),
        }  # fmt: skip

    @property
    def counts(self) -> dict[str, int]:
        """Skipped and truncated rows so far by cause, including those of the whole current window."""
        return dict(self._state["counts"])

    @property
    def step(self) -> int:
        """Optimiser steps whose micro-batches were all returned."""
        return self._state["begin"]["step"] + self._state["steps"]

    @property
    def epoch(self) -> int:
        """Epoch in which the current window begins, from 0."""
        return self._state["begin"]["epoch"]

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last micro-batch, in JSON values.

        With `loader`, this is the position after the last batch that the loader returned.
        """
        return {
            "version": STATE_VERSION, "settings": self._settings(), "world_size": self.world_size, **self._state,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position; existing iterators become invalid.

        At the end of a step the number of processes may change.

        Raises:
            ConfigError: the state was made with other settings, or by another version.
        """
        settings = self._settings() | {"version": STATE_VERSION}
        before = state.get("settings", {}) | {"version": state.get("version")}
        if changed := [name for name in settings if settings[name] != before.get(name)]:
            listed = ", ".join(f"{name} was {before.get(name)} and is {settings[name]}" for name in changed)
            raise ConfigError(f"the data cannot continue from the checkpoint's position: {listed}")
        if state["micro_batches"] and state["world_size"] != self.world_size:
            raise ConfigError("the checkpoint is within a step, and was written by another number of processes")
        self._state = {name: state[name] for name in self._state}

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "tokens_per_step": self.tokens_per_step, "window_steps": self.window_steps,
            "micro_batch_tokens": self.micro_batch_tokens, "micro_batches_per_step": self._per_step,
        }  # fmt: skip

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield micro-batches from the current position on.

        Raises:
            ConfigError: a `DataLoader` runs more than one worker.
            DataError: a row or file cannot be used, or no row of an epoch has a sample.
        """
        worker = get_worker_info()
        _check_workers(worker.num_workers if worker else 0)
        maker = StepWindowMaker(
            self.source, self.draw, self.curriculum, self._state["begin"], tokens_per_step=self.tokens_per_step,
            micro_batches_per_step=self._per_step, micro_batch_tokens=self.micro_batch_tokens,
            window_steps=self.window_steps, seed=self.seed, quiet=self.rank > 0,
        )  # fmt: skip
        while True:
            window = maker.next_window()
            for s in range(self._state["steps"], len(window.steps)):
                yield from self._step(window, s, maker.tally)

    def loader(
        self, make_batch: Callable[[MicroBatch], Any] | None = None, num_workers: int = 0, **options: Any
    ) -> StreamLoader:
        """Return a `DataLoader` of `make_batch(micro_batch)` that keeps this stream's position.

        Args:
            make_batch: makes a batch of a micro-batch, such as `icae_fast.training.methods.batch.pack`; it runs in the
                worker, if there is one. Default None: the micro-batch.
            num_workers: 0, or 1 to draw and pack in a second process.
            options: further options of `DataLoader`.
        """
        return StreamLoader(self, make_batch, num_workers, **options)

    def _step(self, window: StepWindow, s: int, tally: Tally) -> Iterator[MicroBatch]:
        """Yield the remaining micro-batches of step s of a window."""
        number = window.begin["step"] + s
        costs = [draft.cost for draft in window.drafts]
        mine = packing.share_of_process(window.steps[s], costs, self.rank, self.world_size)
        for m in range(self._state["micro_batches"], len(mine)):
            place, chosen = mine[m]
            stage, rng = window.stage, random.Random(f"{self.seed}:{number}:{place}")
            size = stage.draw_memory_size(rng)
            samples = [window.drafts[i].build() for i in chosen]
            if stage.wrong_tokens:
                samples = [with_wrong_tokens(sample, stage.wrong_tokens, rng) for sample in samples]
            if stage.own_tokens:
                samples = [with_own_tokens(sample, stage.own_tokens, rng) for sample in samples]
            if size is not None:
                samples = [with_memory_size(self.draw.layout, sample, size) for sample in samples]
            self._advance(window, s, m, len(mine), tally)
            yield MicroBatch(samples, number, size, self.state_dict())

    def _advance(self, window: StepWindow, s: int, m: int, n: int, tally: Tally) -> None:
        """Set the position after micro-batch m of n of step s."""
        step, micro = (s + 1, 0) if m + 1 == n else (s, m + 1)
        begin = window.begin
        if step == len(window.steps):
            begin, step = window.end, 0
        self._state = {"begin": begin, "steps": step, "micro_batches": micro, "counts": dict(tally.counts)}


def _check_workers(n: int) -> None:
    if n > 1:
        raise ConfigError(
            f"the data loader has {n} workers; the stream supports 0 or 1, because each sample would come {n} times"
        )


class StreamLoader(DataLoader):
    """A `DataLoader` of a `BatchStream` whose position in this process follows the batches returned.

    Args:
        stream: stream to load.
        make_batch: makes a batch of a micro-batch; None returns the micro-batch.
        num_workers: 0 or 1. A worker reads ahead, in a copy of the stream.
        options: further options of `DataLoader`.

    Raises:
        ConfigError: num_workers is greater than 1.
    """

    dataset: BatchStream

    def __init__(
        self,
        stream: BatchStream,
        make_batch: Callable[[MicroBatch], Any] | None = None,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        _check_workers(num_workers)
        # torch annotates a function of a list; without a batch size it is called with a single micro-batch.
        collate: Any = _WithState(make_batch)
        super().__init__(stream, None, num_workers=num_workers, collate_fn=collate, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch annotates a private iterator class
        """Yield batches from the stream's position on."""
        for batch, state in super().__iter__():
            if self.num_workers:
                self.dataset.load_state_dict(state)
            yield batch


class _WithState:
    """A function that makes a batch and adds the stream's state; a class, so that it can be pickled for a worker."""

    def __init__(self, make_batch: Callable[[MicroBatch], Any] | None) -> None:
        self.make_batch = make_batch

    def __call__(self, samples: MicroBatch) -> tuple[Any, dict[str, Any]]:
        return samples if self.make_batch is None else self.make_batch(samples), samples.state


def held_out(
    source: MappedSource | StreamedSource, draw: Draw, stage: Stage, n_samples: int, micro_batch_tokens: int,
    seed: int = 0,
) -> list[list[Sample]]:  # fmt: skip
    """Return evaluation samples, the same at each call: the first of the rows, in micro-batches of similar samples.

    Args:
        source, draw, micro_batch_tokens, seed: as for `BatchStream`.
        stage: stage that the samples are drawn for; each sample has the adapter's k slots per span.
        n_samples: number of samples, at most.

    Raises:
        ConfigError: the stage cannot be drawn.
        DataError: no row has a sample.
    """
    draw.check(stage)
    tally, drafts = Tally(), []
    for origin, problem in source.bad_rows:
        tally.add(f"{SKIPPED}: {problem}", origin)
    for row in source.rows(0):
        drafts += draw_row(draw, row, stage, seed, 0, tally)
        if len(drafts) >= n_samples:
            break
    if not drafts:
        raise DataError(f"no held-out row yields a sample: {dict(tally.counts)}")
    drafts = sorted(drafts[:n_samples], key=lambda draft: draft.cost)
    runs = micro_batches([draft.cost for draft in drafts], micro_batch_tokens)
    return [[drafts[i].build() for i in run] for run in runs]
