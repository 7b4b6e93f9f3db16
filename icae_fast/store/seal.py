"""Sealed files: safetensors with a checksum over every byte, read by mapping and without a copy.

The only entry of the safetensors metadata is a JSON object, so that any safetensors reader can open the file. Two of
its fields are the seal: `tensor_crc32` has a CRC-32 for each tensor; `header_crc32` covers the file up to the first
tensor, computed with its own eight digits as zeros. CRC-32 detects all damage within four consecutive bytes, and misses
other damage once in 2^32. It does not protect from deliberate changes. Equal tensors and fields give equal files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from icae_fast.io.files import tensor_bytes

METADATA = "icae_memory"
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
    """Return the bytes before the first tensor, or none if their stated length exceeds the file."""
    end = 8 + int.from_bytes(blob[:8].numpy().tobytes(), "little")
    return blob[:end].numpy().tobytes() if end <= len(blob) else b""


class Sealed:
    """A sealed file with an intact header; make one with `open`.

    Attributes:
        fields: the fields passed to `seal`.
        names: names of the tensors.
    """

    def __init__(self, blob: torch.Tensor, header: dict[str, Any], start: int) -> None:
        self.fields: dict[str, Any] = json.loads(header.pop("__metadata__")[METADATA])
        self._blob, self._specs, self._start = blob, header, start
        self._sums: dict[str, str] = self.fields.pop(_TENSORS)
        self.names = frozenset(header)
        del self.fields[_HEADER]

    @staticmethod
    def found(blob: torch.Tensor) -> bool:
        """Whether a file has a seal; false for other files, and for files cut off within the header."""
        return _MARK in _head(blob)

    @classmethod
    def open(cls, blob: torch.Tensor) -> Sealed:
        """Read and check the header of a file.

        Args:
            blob: (size,) uint8 on the CPU, the file's bytes in memory or mapped.

        Raises:
            ValueError: there is no seal, the header is damaged, or the file has the wrong size; the message says which.
        """
        head = _head(blob)
        at = head.find(_MARK) + len(_MARK)
        if at < len(_MARK):
            raise ValueError("it is truncated within its header, or not a memory file")
        if head[at : at + 8] != b"%08x" % zlib.crc32(head[:at] + _ZEROS + head[at + 8 :]):
            raise ValueError("the checksum of its header is wrong")
        header = json.loads(head[8:])
        size = len(head) + max((s["data_offsets"][1] for n, s in header.items() if n != "__metadata__"), default=0)
        if len(blob) != size:
            raise ValueError(f"it has {len(blob)} bytes instead of {size}")
        return cls(blob, header, len(head))

    def tensor(self, name: str, verify: bool = True) -> torch.Tensor:
        """Return a tensor as a view of the file's bytes.

        Args:
            name: one of `names`.
            verify: compare the checksum, which reads the tensor once.

        Raises:
            ValueError: the checksum is wrong.
        """
        spec = self._specs[name]
        first, last = (self._start + offset for offset in spec["data_offsets"])
        flat = self._blob[first:last]
        if verify and crc32(flat) != self._sums[name]:
            raise ValueError(f"the checksum of its {name} is wrong")
        return flat.view(_DTYPES[spec["dtype"]]).reshape(spec["shape"])
