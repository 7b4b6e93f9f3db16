"""Sources of training rows: files, folders, globs, URLs, or data sets on the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import datasets

from icae_fast.core.tokens import SpecialTokens
from icae_fast.errors import ConfigError, DataError
from icae_fast.training.data.records import (
    TEXT,
    TEXT_FIELD,
    Record,
    Wanted,
    check_columns,
    file_version,
    find_files,
    read_records,
)
from icae_fast.training.data.rows import MappedSource, RecordStream, StreamedSource, bad_row_message, hub_records
from icae_fast.training.data.tokenise import Tokenise, tokenise_once
from icae_fast.training.methods.curriculum import check_keys

_READ_ROWS = 256  # rows per read of a data set


@dataclass(frozen=True)
class SourceSpec:
    """A source of rows.

    Args:
        path: a file, a folder or a glob, local or a URL that fsspec knows; or a data set on the hub.
        config: configuration of the hub data set.
        split: split of the hub data set.
        revision: revision of the hub data set. Set it, because a resumed run needs the same rows.
        text_field: field or column of the text, in rows for pretraining.
        streaming: read and tokenise during training, and store nothing on the disk.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = TEXT_FIELD
    streaming: bool = False

    @classmethod
    def make(cls, value: str | Mapping[str, Any] | SourceSpec) -> SourceSpec:
        """Return a spec from a path or from a mapping of fields.

        Raises:
            ConfigError: a field is missing, unknown or of the wrong type.
        """
        if isinstance(value, SourceSpec):
            return value
        values = {"path": value} if isinstance(value, str) else value
        if not isinstance(values, Mapping):
            raise ConfigError(f"a data source is {value!r}; give a path, or a mapping with the field path")
        check_keys("a data source", values, [f.name for f in fields(cls)], ("path",))
        for name, given in values.items():
            kinds = (
                (bool,)
                if name == "streaming"
                else (str,)
                if name in ("path", "split", "text_field")
                else (str, type(None))
            )
            if not isinstance(given, kinds):
                raise ConfigError(f"a data source's {name} is {given!r}; it must be {kinds[0].__name__}")
        return cls(**values)

    def wanted(self, fields: tuple[str, ...]) -> Wanted:
        """Return the fields of a record and where rows have them."""
        return Wanted(fields, text_field=self.text_field)


def open_source(
    specs: str | Mapping[str, Any] | SourceSpec | Sequence[str | Mapping[str, Any] | SourceSpec],
    tokenizer: Any,
    fields: tuple[str, ...] = TEXT,
    *,
    on_bad_row: str = "skip",
    fragment_tokens: int | None = None,
    cache_folder: str | None = None,
    seed: int = 0,
    special_tokens: SpecialTokens = "text",
) -> MappedSource | StreamedSource:
    """Return the rows of one or several files, folders, globs or data sets on the hub.

    Args:
        specs: sources to read, either all streaming or none.
        tokenizer: fast tokenizer of the base model.
        fields: `icae_fast.training.data.records.TEXT` or `PWC`.
        on_bad_row: "skip" returns bad rows with their `problem`, for the stream to count and log; "stop" raises. Rows
            that are not streamed are all checked before this returns.
        fragment_tokens: longest part of a document, in tokens. A document that is not streamed is visited in equal
            parts, each at its own place in the epoch's order, so that neighbouring samples come from different books.
            The longest excerpt of the run is a good choice. Default None: whole documents.
        cache_folder: folder of tokenised rows, None for the default of `datasets`.
        seed: seed of the orders.
        special_tokens: how the spelling of a control token in a text is read, see `ICAE.special_tokens`.

    Raises:
        ConfigError: an option or a spec is invalid.
        DataError: nothing is found, a file cannot be read, no row can be used, or a row is bad with "stop".
        TokenizerMismatchError: the tokenizer is missing or slow.
        CacheError: the tokenised rows cannot be written.
    """
    if on_bad_row not in ("skip", "stop"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; it must be 'skip' or 'stop'")
    if fragment_tokens is not None and fragment_tokens < 1:
        raise ConfigError(f"fragment_tokens is {fragment_tokens}; it must be at least 1, or None")
    if isinstance(specs, (str, Mapping, SourceSpec)):
        specs = [specs]
    chosen = [SourceSpec.make(s) for s in specs]
    if not chosen:
        raise ConfigError("the list of data sources is empty; give at least one")
    if len({spec.streaming for spec in chosen}) > 1:
        raise ConfigError("some data sources are streamed and some not; set streaming for all of them or for none")
    tokenise = Tokenise(tokenizer, fields, special_tokens)
    if chosen[0].streaming:
        return StreamedSource([_streamed(s, fields) for s in chosen], tokenise, on_bad_row == "stop", seed)
    parts = [_tokenised(spec, tokenise, cache_folder) for spec in chosen]
    source = MappedSource(datasets.concatenate_datasets(parts), fields, fragment_tokens, seed)
    if source.bad_rows and on_bad_row == "stop":
        origin, problem = source.bad_rows[0]
        raise DataError(bad_row_message(origin, problem) + f" ({len(source.bad_rows)} such rows in all)")
    if not len(source):
        causes = Counter(problem for _, problem in source.bad_rows)
        listed = ", ".join(f"{n} times {cause}" for cause, n in causes.most_common())
        raise DataError(f"{', '.join(spec.path for spec in chosen)} has no usable row: {listed}")
    return source


def _tokenised(spec: SourceSpec, tokenise: Tokenise, cache_folder: str | None) -> datasets.Dataset:
    """Return all rows of a spec, tokenised once."""
    paths = _files(spec)
    identity: list[Any]
    if paths is not None:
        identity = [[path, file_version(path)] for path in paths]
        identity += [spec.text_field] if spec.text_field != TEXT_FIELD else []  # earlier caches stay valid
        records = read_records(paths, tokenise.fields, text_field=spec.text_field)
        return tokenise_once(spec.path, records, identity, tokenise, cache_folder)
    wanted = spec.wanted(tokenise.fields)
    dataset = _load_hub(spec, wanted)
    identity = [asdict(spec), dataset.cache_files]  # the folders are named by config and revision

    def hub_rows() -> Iterator[Record]:
        for start in range(0, len(dataset), _READ_ROWS):
            batch = dataset[start : start + _READ_ROWS]
            yield from hub_records(batch, range(start, len(dataset)), wanted, _hub_name(spec))

    return tokenise_once(_hub_name(spec), hub_rows(), identity, tokenise, cache_folder)


def _streamed(spec: SourceSpec, fields: tuple[str, ...]) -> RecordStream:
    """Return the records of a spec, read on demand."""
    wanted, paths = spec.wanted(fields), _files(spec)
    if paths is None:
        return RecordStream(_load_hub(spec, wanted), wanted, _hub_name(spec))
    # `datasets` makes a shard of each item of a list, so `fields` stays a tuple.
    files = {"paths": paths, "fields": fields, "text_field": spec.text_field}
    return RecordStream(datasets.IterableDataset.from_generator(read_records, gen_kwargs=files), wanted)


def _files(spec: SourceSpec) -> list[str] | None:
    """Return the spec's files, None for a data set of the hub."""
    paths = find_files(spec.path)
    given = [n for n, v in (("config", spec.config), ("revision", spec.revision)) if v is not None]
    if paths is not None and given:
        raise ConfigError(
            f"{spec.path} is read from files, which have no {' and no '.join(given)}; leave out these fields"
        )
    return paths


def _hub_name(spec: SourceSpec) -> str:
    return f"{spec.path}[{spec.split}]"


def _load_hub(spec: SourceSpec, wanted: Wanted) -> Any:
    """Return a data set of the hub with only the columns of `wanted.fields`.

    Raises:
        DataError: it cannot be loaded, or lacks a column.
    """
    try:
        dataset = datasets.load_dataset(
            spec.path, spec.config, split=spec.split, revision=spec.revision, streaming=spec.streaming
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{spec.path} is not a file or folder, and could not be loaded as a data set of the hub: {error}"
        ) from error
    columns = dataset.column_names
    if columns is None:  # unknown for some streamed data sets
        return dataset
    return dataset.select_columns(check_columns(_hub_name(spec), columns, wanted))
