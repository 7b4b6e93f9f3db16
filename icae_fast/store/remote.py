"""A memory store at an fsspec address: one object per entry, named after its key, without an index."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

import torch

from icae_fast.errors import CheckpointError, InvalidInputError, MemoryNotFoundError, StoreError
from icae_fast.io.packages import importing
from icae_fast.store.folder import SUFFIX
from icae_fast.store.seal import MAX_HEADER, Sealed

_HEAD_BYTES = 256 << 10  # the first request for an entry; most entries and nearly all headers are smaller
_LONGEST_NAME = 800  # bytes; S3 allows 1024 for the whole name with its folders


class RemoteFolder:
    """Entries as bytes, by key, with the methods of `LocalFolder`.

    Object stores make an object visible completely or not at all, which is sufficient for an atomic put. An entry is
    therefore one object, its name is the quoted key, and listing the folder lists the keys. SQLite needs locks and
    writes within a file, which object stores do not have.

    Args:
        url: the address, e.g. "s3://bucket/memories".
        options: options of the fsspec file system.

    Raises:
        StoreError: fsspec does not know the protocol.
        MissingPackageError: the package for the protocol is not installed.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        import fsspec

        try:
            self.fs, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            # fsspec raises a sentence, from the ImportError that names the package.
            name = getattr(error.__cause__, "name", None) or error.name
            with importing(f"the store {url}", f"pip install {name}" if name else "pip install 'fsspec[full]'"):
                raise ImportError(str(error), name=name) from error
        except ValueError as error:
            raise StoreError(f"{url} cannot be opened: {error}; check the address") from error
        self.url, self.root = url, root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def _path(self, key: str) -> str:
        name = _name_of(key)
        if len(name) > _LONGEST_NAME:
            raise InvalidInputError(f"the key {key[:40]!r}... takes {len(name)} bytes in an address; use a shorter one")
        return f"{self.root}/{name}"

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"the store {self.url} cannot be used: {error}; check address and access") from error

    def read(self, key: str) -> torch.Tensor:
        """Fetch an entry and return its bytes, (size,) uint8; no more of an object than its header states.

        Raises:
            MemoryNotFoundError: there is no such entry.
            CheckpointError: it is empty.
            StoreError: the store cannot be reached.
        """
        blob = self.head(key)
        with contextlib.suppress(ValueError):  # a damaged header is reported by whoever reads it
            missing = Sealed.open(blob, whole=False).size - len(blob)
            if missing > 0:  # one byte more shows that the object is too long
                rest = self._fetch(key, len(blob), len(blob) + missing + 1)
                return torch.cat((blob, rest)) if len(rest) else blob
        return blob

    def head(self, key: str) -> torch.Tensor:
        """Fetch the beginning of an entry with its header, (size,) uint8; raises as `read`."""
        blob = self._fetch(key, 0, _HEAD_BYTES)
        if not len(blob):
            raise CheckpointError(f"entry {key!r} of the store {self.url} is empty; delete it and compress again")
        end = 8 + int.from_bytes(blob[:8].numpy().tobytes(), "little")
        if len(blob) < end <= MAX_HEADER and len(blob) >= _HEAD_BYTES:
            blob = torch.cat((blob, self._fetch(key, len(blob), end)))
        return blob

    def _fetch(self, key: str, start: int, end: int) -> torch.Tensor:
        try:
            with self._reaching():
                data = bytearray(self.fs.cat_file(self._path(key), start=start, end=end))
        except FileNotFoundError as error:
            raise MemoryNotFoundError(f"the store {self.url} has no entry {key!r}; see its keys()") from error
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def write(self, entries: Mapping[str, bytes | bytearray]) -> None:
        """Put entries one after another.

        Raises:
            StoreError: the store cannot be reached or written; entries that were already put remain.
        """
        paths = {key: self._path(key) for key in entries}
        with self._reaching():
            self.fs.makedirs(self.root, exist_ok=True)
            for key, data in entries.items():
                self.fs.pipe_file(paths[key], bytes(data))

    def delete(self, key: str) -> bool:
        """Remove an entry and return whether it existed."""
        if key not in self:  # deleting a missing object is no error on S3
            return False
        try:
            with self._reaching():
                self.fs.rm_file(self._path(key))
        except FileNotFoundError:
            return False
        return True

    def __contains__(self, key: str) -> bool:
        path = self._path(key)
        with self._reaching():
            self.fs.invalidate_cache(self.root)
            return bool(self.fs.exists(path))

    def keys(self) -> Iterator[str]:
        """Yield all keys in order, from a listing of the folder."""
        try:
            with self._reaching():
                self.fs.invalidate_cache(self.root)
                found = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:  # the folder appears with the first put
            found = []
        names = (entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] != "directory")
        keys = [_key_of(name) for name in names]
        return iter(sorted(key for key in keys if key))

    def __len__(self) -> int:
        return sum(1 for _ in self.keys())

    def clean(self, older_than: float) -> int:
        """Return 0: an interrupted put leaves no file."""
        return 0

    def close(self) -> None:
        """Do nothing: there is no connection to close."""


def _name_of(key: str) -> str:
    return quote(key, safe="") + SUFFIX


def _key_of(name: str) -> str | None:
    """Return the key of an object, or None if the store gives no such name."""
    key = unquote(name.removesuffix(SUFFIX))
    return key if name == _name_of(key) else None
