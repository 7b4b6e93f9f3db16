"""Records of text with their provenance: from JSONL, Parquet and text files, local or remote, compressed or not.

A record is a dict of the row's text fields, its `origin` ("books.jsonl:17") and its `problem`. The problem is empty if
the row can be used; otherwise the fields are empty.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from icae_fast.core.text import decode_text, unified
from icae_fast.errors import DataError, InvalidInputError
from icae_fast.training.data.opening import (
    COMPRESSED,
    DAMAGE,
    open_data,
    read_lines,
    read_whole,
    without_compression,
)

Record = dict[str, str]

TEXT = ("text",)  # rows of The Pile
PWC = ("input", "prompt", "answer")  # rows of Prompt-with-Context
TEXT_FIELD = "text"

_PARQUET_ROWS = 256  # rows per read: a row may be a whole book
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class Wanted(NamedTuple):
    """The fields of a record, and where they stand in a row.

    Args:
        fields: names of the text fields.
        optional: names of further fields, empty where a row has no text in them.
        text_field: the field or column of a row that becomes "text".
    """

    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()
    text_field: str = TEXT_FIELD

    def column(self, name: str) -> str:
        """Return the name that a field has in a row."""
        return self.text_field if name == TEXT_FIELD else name


def make_record(row: Any, wanted: Wanted, origin: str) -> Record:
    """Return the record of one row.

    Args:
        row: value of a line or table row; a usable one is a mapping with text in all `wanted.fields`.
        wanted: the record's fields.
        origin: provenance of the row.
    """
    if not isinstance(row, Mapping):
        return _record(wanted, origin, "not a JSON object")
    if problem := next(filter(None, (_field_problem(wanted.column(name), row) for name in wanted.fields)), ""):
        return _record(wanted, origin, problem)
    texts = {name: unified(row[wanted.column(name)]) for name in wanted.fields}
    more = {name: "" if _field_problem(name, row) else unified(row[name]) for name in wanted.optional}
    return {"origin": origin, "problem": "", **texts, **more}


def _record(wanted: Wanted, origin: str, problem: str) -> Record:
    """Return the record of a row that cannot be used."""
    return {"origin": origin, "problem": problem, **dict.fromkeys((*wanted.fields, *wanted.optional), "")}


def _field_problem(name: str, row: Mapping[str, Any]) -> str:
    if name not in row:
        return f"no field {name!r}"
    value = row[name]
    if not isinstance(value, str):
        return f"field {name!r} is not text"
    if not unified(value).strip():
        return f"field {name!r} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may escape half a surrogate pair, which tokenizers reject
        return f"field {name!r} is not Unicode"
    return f"field {name!r} holds a NUL character" if "\0" in value else ""


def read_records(
    paths: Iterable[str], fields: tuple[str, ...], optional: tuple[str, ...] = (), text_field: str = TEXT_FIELD
) -> Iterator[Record]:
    """Yield the records of files, one file after the other.

    Lines of JSON are numbered from 1, rows of Parquet from 0; a `.txt` file is one row. Blank lines are skipped.

    Args:
        paths: files of known extensions, from `find_files`.
        fields, optional, text_field: see `Wanted`; a `.txt` file has only the field "text".

    Raises:
        DataError: a file cannot be read to its end, a row is longer than `LARGEST_ROW`, or a Parquet file lacks a
            column.
    """
    wanted = Wanted(fields, optional, text_field)
    for path in paths:
        place = path
        try:
            with open_data(path) as file:
                for record in _READERS[_extension(path)](file, path, wanted):
                    place = record["origin"]
                    yield record
        except DAMAGE as error:
            raise DataError(f"cannot read {path} beyond {place}: {error}; replace the file or leave it out") from error


def _read_jsonl(file: Any, path: str, wanted: Wanted) -> Iterator[Record]:
    for number, line in enumerate(read_lines(file, path), 1):
        origin = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield _record(wanted, origin, "not UTF-8")
        except (ValueError, RecursionError):
            yield _record(wanted, origin, "not JSON")
        else:
            yield make_record(row, wanted, origin)


def _read_parquet(file: Any, path: str, wanted: Wanted) -> Iterator[Record]:
    table = pq.ParquetFile(file)
    known = table.schema_arrow.names
    columns = [*check_columns(path, known, wanted), *(name for name in wanted.optional if name in known)]
    number = 0
    for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
        for row in _rows(batch):
            origin = f"{path}:row {number}"
            yield _record(wanted, origin, "not UTF-8") if row is None else make_record(row, wanted, origin)
            number += 1


def check_columns(name: str, columns: Sequence[str], wanted: Wanted) -> list[str]:
    """Return the columns of the wanted fields.

    Raises:
        DataError: a column is missing.
    """
    needed = [wanted.column(field) for field in wanted.fields]
    if missing := [column for column in needed if column not in columns]:
        raise DataError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(columns)}, and rows need "
            f"{', '.join(needed)}{_other_field(wanted)}"
        )
    return needed


def _rows(batch: Any) -> list[Any]:
    """Return the rows of a batch, None for one that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [None] if len(batch) == 1 else [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


def _read_text(file: Any, path: str, wanted: Wanted) -> Iterator[Record]:
    if wanted.fields != TEXT:
        raise DataError(f"{path} is plain text, and rows need {', '.join(wanted.fields)}; give JSONL or Parquet")
    try:
        text = decode_text(read_whole(file, path), "it")
    except InvalidInputError as error:
        yield _record(wanted, path, str(error))
    else:
        yield make_record({wanted.text_field: text}, wanted, path)


def _other_field(wanted: Wanted) -> str:
    """Return the advice for rows that lack the field of the text."""
    return (
        "; name the field of the text (--text-field, or text_field of a source)" if TEXT_FIELD in wanted.fields else ""
    )


_READERS: dict[str, Callable[[Any, str, Wanted], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _extension(path: str) -> str:
    """Return a file's extension without that of its compression."""
    return os.path.splitext(without_compression(path))[1].lower()


def find_files(path: str) -> list[str] | None:
    """Return the files that a path names, sorted, or None if it can only be the name of a data set on the hub.

    Args:
        path: a file, a folder (all files of known extensions in it and below), a glob (`**` for folders), or a URL of
            one of these that fsspec knows ("s3://bucket/part-*.parquet").

    Returns:
        File names with the same beginning as `path`, or None.

    Raises:
        DataError: nothing is found, or a file has an unknown extension.
    """
    path = os.path.expanduser(path)
    try:
        fs, root = url_to_fs(path)
        local = isinstance(fs, LocalFileSystem)
        is_glob, is_folder = any(c in path for c in "*?["), fs.isdir(root)
        if is_glob:
            found = [name for name in fs.glob(root) if not fs.isdir(name)]
        elif is_folder:
            found = [name for name in fs.find(root) if _extension(name) in _READERS]
        else:
            found = [root] if fs.exists(root) else []
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot look for {path}: {error}") from error
    if found:
        names = sorted(_named(fs, name, path, local) for name in found)
        return _checked_extensions(names)
    if not is_folder and _HUB_NAME.fullmatch(path) and _extension(path) not in _READERS:
        return None
    where = "no file of a known extension in" if is_folder else "nothing matches" if is_glob else "there is no"
    raise DataError(f"{where} {path}; known are {_known()}, a folder or a glob of those, and data sets on the hub")


def _named(fs: Any, name: str, path: str, local: bool) -> str:
    """Return the name of a found file in the user's notation."""
    if not local:
        return fs.unstrip_protocol(name)
    return name if os.path.isabs(path) or "://" in path else os.path.relpath(name)


def _checked_extensions(names: list[str]) -> list[str]:
    for name in names:
        if _extension(name) not in _READERS:
            raise DataError(
                f"{name} has an unknown extension; known are {_known()}. rename a file with one JSON object per line "
                "to .jsonl"
            )
    return names


def _known() -> str:
    return f"{', '.join(_READERS)} (and compressed: {', '.join(COMPRESSED)})"


def usable_records(
    paths: Sequence[str],
    fields: tuple[str, ...],
    what: str,
    optional: tuple[str, ...] = (),
    text_field: str = TEXT_FIELD,
) -> tuple[list[Record], Counter[str]]:
    """Return all usable records of files, folders and globs, and the number of others by problem.

    Args:
        paths: see `find_files`; data sets of the hub are not accepted.
        fields, optional, text_field: see `Wanted`.
        what: name of the records in errors, such as "text".

    Raises:
        DataError: nothing is found, a file cannot be read, or no row can be used.
    """
    usable: list[Record] = []
    problems: Counter[str] = Counter()
    for path in paths:
        files = find_files(path)
        if files is None:
            raise DataError(f"there is no file or folder {path}; data sets of the hub are not read here")
        for record in read_records(files, fields, optional, text_field):
            if record["problem"]:
                problems[record["problem"]] += 1
            else:
                usable.append(record)
    if not usable:
        causes = ", ".join(f"{n} times {cause}" for cause, n in problems.most_common()) or "no row at all"
        advice = _other_field(Wanted(fields)) if f"no field {text_field!r}" in problems else ""
        raise DataError(f"{', '.join(paths)} have no usable {what}: {causes}{advice}")
    return usable, problems


def file_version(path: str) -> str:
    """Return a hash that changes with a file, from its size and time, or its ETag, in the file system."""
    fs, root = url_to_fs(path)
    return fs.ukey(root)
