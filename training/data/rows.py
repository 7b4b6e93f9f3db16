"""Rows of token ids in an order that depends on a seed and the epoch alone, and places in it.

`MappedSource` reads rows that were tokenised beforehand and visits them in a random order; `StreamedSource` tokenises
as it reads, and draws the order of files (or of a data set's shards) alone. Either way `rows(epoch)` gives an iterator
whose `state_dict` says exactly where it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from icae_fast.errors import DataError
from icae_fast.training.data.records import Record, make_record
from icae_fast.training.data.tokenise import Tokenise, ids_column

STREAMED_ROWS = 32  # tokenised in one call; a resumed run tokenises up to so many again


@dataclass(frozen=True)
class Row:
    """A tokenised row, or the part of a document in which the windows of an epoch begin.

    Args:
        key: names it within its source, whatever the order; random draws depend on it.
        origin: where its text stands: "books.jsonl:17".
        ids: (L,) int32 token ids of each field. Only the first begins with the tokenizer's special tokens.
        start, end: windows begin at tokens `start` to `end - 1` of the first field.
        problem: why it cannot be used; `ids` are empty then.
    """

    key: str
    origin: str
    ids: tuple[np.ndarray, ...]
    start: int
    end: int
    problem: str = ""


class RowIterator(Iterator[Row]):
    """The rows of an epoch, in order, and a place among them."""

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last row given, in JSON values."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a place.

        Raises:
            DataError: the state was made with other data.
        """
        raise NotImplementedError


class MappedSource:
    """Rows that were tokenised beforehand, in an order drawn for each epoch.

    Args:
        dataset: as `icae_fast.training.data.tokenise.tokenise_once` gives it.
        fields: text fields of a row.
        fragment_tokens: see `open_source`.
        seed: of the orders.

    Attributes:
        bad_rows: (origin, problem) of each row that cannot be used; these are in no epoch.
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
        """Rows of an epoch, the parts of a document counted one by one."""
        return len(self._documents)

    def __getitem__(self, index: int) -> Row:
        """A row by its place in the data."""
        row = self._rows[int(self._documents[index])]
        ids = tuple(row.column(ids_column(name))[0].values.to_numpy() for name in self.fields)
        n = len(ids[0])
        parts, part = (-(-n // self._fragment), int(self._parts[index])) if self._fragment else (1, 0)
        start, end = part * n // parts, (part + 1) * n // parts
        return Row(str(index), row.column("origin")[0].as_py(), ids, start, end)

    def order(self, epoch: int) -> np.ndarray:
        """(len(self),) places of the rows of an epoch, a permutation."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self._order[1]

    def rows(self, epoch: int) -> RowIterator:
        """The rows of an epoch, each once."""
        return _MappedRows(self, epoch)


class _MappedRows(RowIterator):
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
    """Rows that are read and tokenised as they are asked for, file after file (or shard after shard of a data set).

    Args:
        streams: what to read.
        tokenise: gives the ids.
        stop: raise at a bad row, instead of giving it.
        seed: of the order of files.

    Attributes:
        bad_rows: none; they come among the rows.
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
        """Files and shards."""
        return len(self._shards)

    def shard(self, index: int) -> datasets.IterableDataset:
        """The tokenised rows of one of them."""
        stream, i = self._shards[index]
        return stream.shard(i).map(self._tokenise, batched=True, batch_size=STREAMED_ROWS)

    def rows(self, epoch: int) -> RowIterator:
        """The rows of an epoch, bad ones included.

        The iterator raises DataError where a file cannot be read, where no row of the epoch can be used, and at a bad
        row if asked to.
        """
        return _StreamedRows(self, epoch)


@dataclass(frozen=True)
class RecordStream:
    """Records of files or of a data set of the hub, in shards."""

    dataset: datasets.IterableDataset
    fields: tuple[str, ...]
    hub_name: str | None = None

    def shard(self, index: int) -> datasets.IterableDataset:
        n = self.dataset.num_shards
        shard = self.dataset.shard(n, index)
        if self.hub_name is None:
            return shard
        name = self.hub_name if n == 1 else f"{self.hub_name}:shard {index}"
        return shard.map(
            _hub_columns, batched=True, batch_size=STREAMED_ROWS, with_indices=True,
            fn_kwargs={"fields": self.fields, "name": name},
        )  # fmt: skip


class _StreamedRows(RowIterator):
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
            raise DataError("the streamed data gives no row that can be used; the log says what is wrong with them")
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
            f"the data has {now} {what}, and had {before} when the checkpoint was written; a run can only go on with "
            "the same data and window sizes"
        )


def bad_row_message(origin: str, problem: str) -> str:
    """The sentence for a bad row that ends a run."""
    return f"{origin}: {problem}; mend the row, or set on_bad_row to 'skip'"


def _hub_columns(batch: Mapping[str, list], rows: Sequence[int], fields: tuple[str, ...], name: str) -> dict[str, list]:
    """The same as columns, for `datasets` to map over."""
    records = hub_records(batch, rows, fields, name)
    return {key: [r[key] for r in records] for key in records[0]}


def hub_records(batch: Mapping[str, list], rows: Sequence[int], fields: tuple[str, ...], name: str) -> list[Record]:
    """Records of the rows of a batch, which are numbers `rows` of the data set."""
    n_rows = len(next(iter(batch.values())))
    values = [{n: batch[n][i] for n in fields if n in batch} for i in range(n_rows)]
    return [make_record(v, fields, f"{name}:{row}") for v, row in zip(values, rows, strict=False)]
