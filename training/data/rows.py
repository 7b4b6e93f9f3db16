"""Rows of token ids in an order that depends only on a seed and the epoch, and positions in that order.

`MappedSource` reads rows that were tokenised beforehand and visits them in random order. `StreamedSource` tokenises
while it reads, and only draws the order of files (or of a data set's shards). In both, `rows(epoch)` returns an
iterator whose `state_dict` is its exact position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from icae_fast.errors import DataError
from icae_fast.training.data.records import Record, Wanted, make_record
from icae_fast.training.data.tokenise import Tokenise, ids_column

STREAMED_ROWS = 32  # rows per call of the tokenizer; a resumed run tokenises up to this many again


@dataclass(frozen=True)
class Row:
    """A tokenised row, or the part of a document in which excerpts of an epoch begin.

    Args:
        key: name within the source, independent of the order; random draws depend on it.
        origin: provenance of the text: "books.jsonl:17".
        ids: (L,) int32 token ids of each field. Only the first field begins with the tokenizer's special tokens.
        start, end: excerpts begin at tokens `start` to `end - 1` of the first field.
        problem: reason why the row cannot be used; its `ids` are then empty. Default "", usable.
    """

    key: str
    origin: str
    ids: tuple[np.ndarray, ...]
    start: int
    end: int
    problem: str = ""


class RowIterator(Iterator[Row]):
    """An iterator over the rows of an epoch, with a position."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last row returned, in JSON values."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position.

        Raises:
            DataError: the state was made with other data.
        """
        raise NotImplementedError


class MappedSource:
    """Rows that were tokenised beforehand, in an order drawn for each epoch.

    Args:
        dataset: dataset from `icae_fast.training.data.tokenise.tokenise_once`.
        fields: text fields of a row.
        fragment_tokens: see `open_source`.
        seed: seed of the orders.

    Attributes:
        bad_rows: (origin, problem) of each row that cannot be used; no epoch contains them.
    """

    def __init__(
        self, dataset: datasets.Dataset, fields: tuple[str, ...], fragment_tokens: int | None = None, seed: int = 0
    ) -> None:
        self.fields = fields
        self.seed = seed
        self._fragment = fragment_tokens
        self._rows = dataset.with_format("arrow")
        bad = pc.not_equal(dataset.data.column("problem"), "").to_numpy()
        bad_rows = dataset.select(np.flatnonzero(bad))
        self.bad_rows = list(zip(bad_rows["origin"], bad_rows["problem"], strict=True))
        good = np.flatnonzero(~bad)
        lengths = pc.list_value_length(dataset.data.column(ids_column(fields[0]))).to_numpy()[good]
        parts = np.ones_like(lengths) if fragment_tokens is None else -(-lengths // fragment_tokens)
        self._documents = np.repeat(good, parts)
        self._parts = np.arange(len(self._documents)) - np.repeat(np.cumsum(parts) - parts, parts)
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Return the rows of an epoch; each part of a document counts as one."""
        return len(self._documents)

    def __getitem__(self, index: int) -> Row:
        """Return a row by its index in the data."""
        row = self._rows[int(self._documents[index])]
        ids = tuple(row.column(ids_column(name))[0].values.to_numpy() for name in self.fields)
        n = len(ids[0])
        parts, part = (-(-n // self._fragment), int(self._parts[index])) if self._fragment else (1, 0)
        start, end = part * n // parts, (part + 1) * n // parts
        return Row(str(index), row.column("origin")[0].as_py(), ids, start, end)

    def order(self, epoch: int) -> np.ndarray:
        """Return a permutation (len(self),) of the indices, the order of an epoch."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self._order[1]

    def rows(self, epoch: int) -> RowIterator:
        """Return an iterator over the rows of an epoch, each once."""
        return _MappedRows(self, epoch)


class _MappedRows(RowIterator):
    """See `MappedSource.rows`."""

    def __init__(self, source: MappedSource, epoch: int) -> None:
        self._source, self._order, self._index = source, source.order(epoch), 0

    def __next__(self) -> Row:
        if self._index == len(self._order):
            raise StopIteration
        self._index += 1
        return self._source[int(self._order[self._index - 1])]

    def state_dict(self) -> dict[str, Any]:
        return {"index": self._index, "rows": len(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_same("rows", state.get("rows"), len(self._order))
        self._index = state["index"]


class StreamedSource:
    """Rows that are read and tokenised on demand, file after file (or shard after shard of a data set).

    Args:
        streams: record streams to read.
        tokenise: maps records to ids.
        stop: raise at a bad row instead of returning it.
        seed: seed of the order of files.

    Attributes:
        bad_rows: always empty; bad rows are among the rows.
    """

    bad_rows: tuple[tuple[str, str], ...] = ()

    def __init__(self, streams: Sequence[RecordStream], tokenise: Tokenise, stop: bool = False, seed: int = 0) -> None:
        self.fields = tokenise.fields
        self.seed = seed
        self.stop = stop
        self._tokenise = tokenise
        self._shards = [(stream, i) for stream in streams for i in range(stream.dataset.num_shards)]

    @property
    def n_shards(self) -> int:
        """Number of files and shards."""
        return len(self._shards)

    def shard(self, index: int) -> datasets.IterableDataset:
        """Return the tokenised rows of a file or shard."""
        stream, i = self._shards[index]
        return stream.shard(i).map(self._tokenise, batched=True, batch_size=STREAMED_ROWS)

    def rows(self, epoch: int) -> RowIterator:
        """Return an iterator over the rows of an epoch, including bad ones.

        The iterator raises DataError if a file cannot be read, if no row of the epoch can be used, and with `stop` at a
        bad row.
        """
        return _StreamedRows(self, epoch)


@dataclass(frozen=True)
class RecordStream:
    """Records of files or of a data set of the hub, in shards.

    Args:
        dataset: dataset of the records.
        wanted: fields of a row.
        hub_name: name for provenance of a data set of the hub; None for files, whose records have their provenance.
    """

    dataset: datasets.IterableDataset
    wanted: Wanted
    hub_name: str | None = None

    def shard(self, index: int) -> datasets.IterableDataset:
        """Return the records of one shard."""
        n = self.dataset.num_shards
        shard = self.dataset.shard(n, index)
        if self.hub_name is None:
            return shard
        name = self.hub_name if n == 1 else f"{self.hub_name}:shard {index}"
        return shard.map(
            _hub_columns, batched=True, batch_size=STREAMED_ROWS, with_indices=True,
            fn_kwargs={"wanted": self.wanted, "name": name},
        )  # fmt: skip


class _StreamedRows(RowIterator):
    """See `StreamedSource.rows`."""

    def __init__(self, source: StreamedSource, epoch: int) -> None:
        self._source = source
        self._order = np.random.default_rng([source.seed, epoch]).permutation(source.n_shards)
        self._shard = self._row = 0
        self._usable = False
        self._inside: dict[str, Any] | None = None
        self._open: tuple[datasets.IterableDataset, Iterator[dict[str, Any]]] | None = None

    def __next__(self) -> Row:
        while self._shard < len(self._order):
            shard = int(self._order[self._shard])
            if self._open is None:
                dataset = self._source.shard(shard)
                if self._inside is not None:
                    dataset.load_state_dict(self._inside)
                self._open = dataset, iter(dataset)
            columns = next(self._open[1], None)
            if columns is not None:
                self._row += 1
                return self._made(columns, f"{shard}:{self._row - 1}")
            self._shard, self._row, self._inside, self._open = self._shard + 1, 0, None, None
        if not self._usable:
            raise DataError("the streamed data has no usable row; the log names the problem of each")
        raise StopIteration

    def _made(self, columns: Mapping[str, Any], key: str) -> Row:
        origin, problem = columns["origin"], columns["problem"]
        if problem and self._source.stop:
            raise DataError(bad_row_message(origin, problem))
        self._usable = self._usable or not problem
        ids = tuple(np.asarray(columns[ids_column(name)], dtype=np.int32) for name in self._source.fields)
        return Row(key, origin, ids, 0, len(ids[0]), problem)

    def state_dict(self) -> dict[str, Any]:
        inside = self._open[0].state_dict() if self._open else self._inside
        return {
            "shard": self._shard, "shards": len(self._order), "row": self._row, "usable": self._usable,
            "inside": inside,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_same("files or shards", state.get("shards"), len(self._order))
        self._shard, self._row, self._usable = state["shard"], state["row"], state["usable"]
        self._inside, self._open = state["inside"], None


def _check_same(what: str, before: int | None, now: int) -> None:
    if before != now:
        raise DataError(
            f"the data has {now} {what}, and had {before} when the checkpoint was written; a run can only continue "
            "with the same data and the same longest stage"
        )


def bad_row_message(origin: str, problem: str) -> str:
    """Return the error message for a bad row that ends a run."""
    return f"{origin}: {problem}; correct the row, or set on_bad_row to 'skip'"


def _hub_columns(batch: Mapping[str, list], rows: Sequence[int], wanted: Wanted, name: str) -> dict[str, list]:
    """Return `hub_records` as columns, for `datasets` to map over."""
    records = hub_records(batch, rows, wanted, name)
    return {key: [r[key] for r in records] for key in records[0]}


def hub_records(batch: Mapping[str, list], rows: Sequence[int], wanted: Wanted, name: str) -> list[Record]:
    """Return the records of a batch, whose rows have the numbers `rows` in the data set."""
    n_rows = len(next(iter(batch.values())))
    columns = [column for column in map(wanted.column, wanted.fields) if column in batch]
    values = [{column: batch[column][i] for column in columns} for i in range(n_rows)]
    return [make_record(v, wanted, f"{name}:{row}") for v, row in zip(values, rows, strict=False)]
