"""Sealed files: safetensors with a checksum over every byte, read by mapping and without a copy.

The only entry of the safetensors metadata is a JSON object, so that any safetensors reader can open the file. Two of
its fields are the seal: `tensor_crc32` has a CRC-32 for each tensor; `header_crc32` covers the file up to the first
tensor, computed with its own eight digits as zeros. CRC-32 detects all damage within four consecutive bytes, and misses
other damage once in 2^32. It does not protect from deliberate changes. Equal tensors and fields give equal files.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from icae_fast.checks import is_int
from icae_fast.io.files import parse_json, tensor_bytes

METADATA = "icae_memory"
MAX_HEADER = 16 << 20  # bytes; that of a text of 100 million tokens is smaller
_TENSORS, _HEADER, _ZEROS = "tensor_crc32", "header_crc32", b"0" * 8
# The JSON object is written as a JSON string, and the checksum is its first field. Within a value, the first quotation
# mark of this pattern would be preceded by a backslash, so the pattern occurs exactly once.
_MARK = f'"{METADATA}":"{{\\"{_HEADER}\\": \\"'.encode()
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
}  # fmt: skip


def crc32(tensor: torch.Tensor) -> str:
    """Return CRC-32 of a contiguous CPU tensor's bytes, 8 hex digits."""
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"


def seal(tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any]) -> bytearray:
    """Return the content of a sealed file.

    Args:
        tensors: floating or int8, by name.
        fields: JSON values of the header.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sums = {_HEADER: _ZEROS.decode(), _TENSORS: {name: crc32(t) for name, t in tensors.items()}}
    data = bytearray(tensor_bytes(tensors, {METADATA: json.dumps(sums | dict(fields))}))
    end = 8 + int.from_bytes(data[:8], "little")
    start = data.index(_MARK, 8, end) + len(_MARK)
    data[start : start + 8] = b"%08x" % zlib.crc32(bytes(data[:end]))
    return data


def _head(blob: torch.Tensor) -> bytes:
    """Return the bytes before the first tensor, or none if their stated length exceeds the file or the limit."""
    end = 8 + int.from_bytes(blob[:8].numpy().tobytes(), "little")
    return blob[:end].numpy().tobytes() if end <= min(len(blob), MAX_HEADER) else b""


@dataclass(frozen=True)
class _Spec:
    """A tensor's place.

    Args:
        dtype: of the tensor.
        shape: of the tensor.
        first, last: bytes behind the header.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    last: int

    @classmethod
    def of(cls, name: str, spec: Any, first: int) -> _Spec:
        """Return the place that the header states for a tensor, if it has the size of the tensor.

        Raises:
            ValueError: see above.
        """
        if isinstance(spec, dict) and isinstance(spec.get("dtype"), str) and spec["dtype"] in _DTYPES:
            dtype, shape, place = _DTYPES[spec["dtype"]], _sizes(spec.get("shape")), _sizes(spec.get("data_offsets"))
            if shape is not None and place is not None and len(place) == 2:
                size = math.prod(shape) * dtype.itemsize
                if place == [first, first + size]:
                    return cls(dtype, tuple(shape), *place)
        raise ValueError(f"its header contradicts itself about the tensor {name[:40]!r}")


def _sizes(value: Any) -> list[int] | None:
    """Return a JSON value if it is a list of whole numbers from 0 on."""
    if isinstance(value, list) and all(is_int(i) and i >= 0 for i in value):
        return value
    return None


def _specs(header: Mapping[str, Any], start: int) -> dict[str, _Spec]:
    """Return the place of each tensor; they follow each other without gaps, each where its dtype can be read."""
    tensors = []
    for name, spec in header.items():
        if name != "__metadata__":
            place = _sizes(spec.get("data_offsets")) if isinstance(spec, dict) else None
            if not place:
                raise ValueError("its header does not say where its tensors are")
            tensors.append((place[0], name, spec))
    specs, end = {}, 0
    for _, name, spec in sorted(tensors, key=lambda found: found[0]):
        specs[name] = _Spec.of(name, spec, end)
        if (start + end) % specs[name].dtype.itemsize:
            raise ValueError(f"its tensor {name[:40]!r} begins at an odd place")
        end = specs[name].last
    return specs


class Sealed:
    """A sealed file with an intact header; make one with `open`.

    Attributes:
        fields: the fields passed to `seal`.
        tensors: dtype and shape of each tensor.
        size: bytes of the file.
    """

    def __init__(self, blob: torch.Tensor, head: bytes) -> None:
        header = parse_json(head[8:])
        metadata = header.get("__metadata__")
        if not (isinstance(metadata, dict) and isinstance(metadata.get(METADATA), str)):
            raise ValueError("its header lacks its metadata")
        self.fields = parse_json(metadata[METADATA])
        self._blob, self._start, self._specs = blob, len(head), _specs(header, len(head))
        self._sums = self.fields.pop(_TENSORS, None)
        if not (isinstance(self._sums, dict) and self._sums.keys() == self._specs.keys()):
            raise ValueError("its header lacks checksums")
        del self.fields[_HEADER]
        self.tensors = {name: (spec.dtype, spec.shape) for name, spec in self._specs.items()}
        self.size = len(head) + max((spec.last for spec in self._specs.values()), default=0)

    @staticmethod
    def found(blob: torch.Tensor) -> bool:
        """Whether a file has a seal; false for other files, and for files cut off within the header."""
        return _MARK in _head(blob)

    @classmethod
    def open(cls, blob: torch.Tensor, *, whole: bool = True) -> Sealed:
        """Read and check the header of a file.

        Args:
            blob: (size,) uint8 on the CPU, the file's bytes in memory or mapped.
            whole: off if the blob is the beginning of a file; then only its header can be used.

        Raises:
            ValueError: there is no seal, the header is damaged, or the file has the wrong size; the message says which.
        """
        head = _head(blob)
        at = head.find(_MARK) + len(_MARK)
        if at < len(_MARK):
            raise ValueError("it is truncated within its header, or not a memory file")
        if head[at : at + 8] != b"%08x" % zlib.crc32(head[:at] + _ZEROS + head[at + 8 :]):
            raise ValueError("the checksum of its header is wrong")
        sealed = cls(blob, head)
        if whole and len(blob) != sealed.size:
            raise ValueError(f"it has {len(blob)} bytes instead of {sealed.size}")
        return sealed

    @torch.inference_mode(False)
    def tensor(self, name: str, verify: bool = True) -> torch.Tensor:
        """Return a tensor that shares the file's bytes; its storage is its own part of them, also for `pickle`.

        Args:
            name: one of `tensors`.
            verify: compare the checksum, which reads the tensor once.

        Raises:
            ValueError: the checksum is wrong.
        """
        spec = self._specs[name]
        flat = torch.from_numpy(self._blob.numpy()[self._start + spec.first : self._start + spec.last])
        if verify and crc32(flat) != self._sums[name]:
            raise ValueError(f"the checksum of its {name} is wrong")
        return flat.view(spec.dtype).reshape(spec.shape)
