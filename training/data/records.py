"""Records of text with their provenance: from JSONL, Parquet and text files, local or remote, compressed or not.

A record is a dict of the row's text fields, its `origin` ("books.jsonl:17") and its `problem`. The problem is empty if
the row can be used; otherwise the fields are empty.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import compressions

from icae_fast.core.text import decode_text, unified
from icae_fast.errors import DataError, InvalidInputError

Record = dict[str, str]

TEXT = ("text",)  # rows of The Pile
PWC = ("input", "prompt", "answer")  # rows of Prompt-with-Context

_PARQUET_ROWS = 256  # rows per read: a row may be a whole book
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def make_record(row: Any, fields: Iterable[str], origin: str, optional: Iterable[str] = ()) -> Record:
    """Return the record of one row.

    Args:
        row: value of a line or table row; a usable one is a mapping with text in all `fields`.
        fields: names of the text fields.
        origin: provenance of the row.
        optional: names of further fields, empty where a row has no text in them.
    """
    problem, values = "", {}
    if not isinstance(row, Mapping):
        problem = "not a JSON object"
    for name in () if problem else fields:
        value = row.get(name)
        problem = problem or _field_problem(name, name in row, value)
        values[name] = "" if problem else unified(value)
    record = _record(fields, origin, problem, values)
    return record | {name: unified(row[name]) if _is_usable(name, row) else "" for name in optional}


def _is_usable(name: str, row: Any) -> bool:
    return isinstance(row, Mapping) and not _field_problem(name, name in row, row.get(name))


def _record(fields: Iterable[str], origin: str, problem: str, values: Mapping[str, str] | None = None) -> Record:
    texts = {name: "" if problem or values is None else values[name] for name in fields}
    return {"origin": origin, "problem": problem, **texts}


def _field_problem(name: str, present: bool, value: Any) -> str:
    if not present:
        return f"no field {name!r}"
    if not isinstance(value, str):
        return f"field {name!r} is not text"
    if not unified(value).strip():
        return f"field {name!r} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may escape half a surrogate pair, which tokenizers reject
        return f"field {name!r} is not Unicode"
    return f"field {name!r} holds a NUL character" if "\0" in value else ""


def read_records(paths: Iterable[str], fields: tuple[str, ...], optional: tuple[str, ...] = ()) -> Iterator[Record]:
    """Yield the records of files, one file after the other.

    Lines of JSONL are numbered from 1, rows of Parquet from 0; a `.txt` file is one row. Blank lines are skipped.

    Args:
        paths: files of known extensions, from `find_files`.
        fields: names of the text fields; a `.txt` file has only the field "text".
        optional: names of further fields, empty where a row has no text in them.

    Raises:
        DataError: a file cannot be read to its end, or a Parquet file lacks a column.
    """
    for path in paths:
        place = path
        try:
            with _open(path) as file:
                for record in _READERS[_extension(path)](file, path, fields, optional):
                    place = record["origin"]
                    yield record
        except _DAMAGE as error:
            raise DataError(f"cannot read {path} beyond {place}: {error}; replace the file or leave it out") from error


def _open(path: str) -> Any:
    """Open a file for binary reading, decompressed according to its name."""
    if path.endswith(".zst") and "zst" not in compressions:
        raise DataError(f"{path} needs the package zstandard; `pip install zstandard` or decompress the file")
    return fsspec.open(path, "rb", compression="infer")


def _read_jsonl(file: Any, path: str, fields: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[Record]:
    # zstandard's reader has no readline
    lines = file if hasattr(file, "readline") else io.BufferedReader(file)
    for number, line in enumerate(lines, 1):
        origin = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield _record(fields, origin, "not UTF-8")
        except (ValueError, RecursionError):
            yield _record(fields, origin, "not JSON")
        else:
            yield make_record(row, fields, origin, optional)


def _read_parquet(file: Any, path: str, fields: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[Record]:
    table = pq.ParquetFile(file)
    if missing := [name for name in fields if name not in table.schema_arrow.names]:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(table.schema_arrow.names)}, and rows need "
            f"{', '.join(fields)}"
        )
    number = 0
    columns = [name for name in (*fields, *optional) if name in table.schema_arrow.names]
    for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
        for row in batch.to_pylist():
            yield make_record(row, fields, f"{path}:row {number}", optional)
            number += 1


def _read_text(file: Any, path: str, fields: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[Record]:
    if fields != TEXT:
        raise DataError(f"{path} is plain text, and rows need {', '.join(fields)}; give JSONL or Parquet")
    try:
        text = decode_text(file.read(), "it")
    except InvalidInputError as error:
        yield _record(fields, path, str(error))
    else:
        yield make_record({"text": text}, fields, path, optional)


_READERS: dict[str, Callable[[Any, str, tuple[str, ...], tuple[str, ...]], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _extension(path: str) -> str:
    """Return a file's extension without that of its compression."""
    for suffix in _COMPRESSED:
        path = path.removesuffix(suffix)
    return os.path.splitext(path)[1].lower()


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
    return f"{', '.join(_READERS)} (and compressed: {', '.join(_COMPRESSED)})"


def usable_records(
    paths: Sequence[str], fields: tuple[str, ...], what: str, optional: tuple[str, ...] = ()
) -> tuple[list[Record], Counter[str]]:
    """Return all usable records of files, folders and globs, and the number of others by problem.

    Args:
        paths: see `find_files`; data sets of the hub are not accepted.
        fields, optional: see `read_records`.
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
        for record in read_records(files, fields, optional):
            if record["problem"]:
                problems[record["problem"]] += 1
            else:
                usable.append(record)
    if not usable:
        causes = ", ".join(f"{n} times {cause}" for cause, n in problems.most_common()) or "no row at all"
        raise DataError(f"{', '.join(paths)} have no usable {what}: {causes}")
    return usable, problems


def file_version(path: str) -> str:
    """Return a hash that changes with a file, from its size and time, or its ETag, in the file system."""
    fs, root = url_to_fs(path)
    return fs.ukey(root)
