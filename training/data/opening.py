"""Open data files, local or remote, compressed or not, and read them without taking a bomb into memory."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pyarrow as pa

from icae_fast.errors import DataError

# What a damaged, cut or unreachable file raises.
DAMAGE = (
    OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException,
    UnicodeDecodeError,  # of a column's name in a Parquet file
)  # fmt: skip

LARGEST_ROW = 1 << 30  # bytes; a thousand long books, and far less than a few MB of zeros can be decompressed to
_READ = 1 << 13  # bytes per read; what a damaged file holds before its damage is read but for so much


def _zstd(raw: Any) -> Any:
    """Return a reader of zstd, of one frame or many; unlike that of fsspec it notices a file that is cut."""
    return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")


_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
COMPRESSED = tuple(_DECOMPRESSORS)


def without_compression(path: str) -> str:
    """Return a file's name without the extension of its compression."""
    for suffix in COMPRESSED:
        if path.lower().endswith(suffix):
            return path[: -len(suffix)]
    return path


@contextlib.contextmanager
def open_data(path: str) -> Iterator[Any]:
    """Open a file for binary reading, decompressed according to its name.

    Args:
        path: a path or a URL that fsspec knows.

    Raises:
        DataError: the file is empty, and its name says that it is compressed.
    """
    suffix = path[len(without_compression(path)) :].lower()
    with fsspec.open(path, "rb") as raw:
        if not suffix:
            yield raw
            return
        with _DECOMPRESSORS[suffix](raw) as file:
            yield file
            if raw.tell() == 0:
                raise DataError(f"{path} is empty, so it is no {suffix} file; replace it or leave it out")


def read_whole(file: Any, path: str) -> bytes:
    """Return the content of a file.

    Raises:
        DataError: it is larger than `LARGEST_ROW`.
    """
    return next(_split(file, path, None), b"")


def read_lines(file: Any, path: str) -> Iterator[bytes]:
    """Yield the lines of a file without their line ends.

    Raises:
        DataError: a line is longer than `LARGEST_ROW`; no more than that is read of it.
    """
    return _split(file, path, b"\n")


def _split(file: Any, path: str, end: bytes | None) -> Iterator[bytes]:
    """Yield the parts of a file between line ends, all of it as one part if `end` is None."""
    read = getattr(file, "read1", file.read)  # read1 returns what there is when the next read would fail
    parts: list[bytes] = []
    size, number = 0, 1
    while chunk := read(_READ):
        *whole, last = chunk.split(end) if end else [chunk]
        for line in whole:
            yield b"".join([*parts, line])
            parts, size, number = [], 0, number + 1
        parts.append(last)
        size += len(last)
        if size > LARGEST_ROW:
            place = f"{path}:{number}" if end else path
            raise DataError(f"{place} is longer than {LARGEST_ROW >> 20} MiB, the most that one row may hold; split it")
    if size:
        yield b"".join(parts)
