"""`Origin`: the base model and adapter that a memory was made with, and keys made of content."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from icae_fast.config import ICAEConfig
from icae_fast.errors import BaseModelMismatchError
from icae_fast.io.identity import base_identity, compare_identities
from icae_fast.ops import fingerprint

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE

# The fields that slots depend on; the others say how the adapter was trained, is prompted, or is found.
_SLOT_FIELDS = (
    "memory_size", "compression_rate", "lora_rank", "lora_alpha", "memory_positions", "slot_scale", "sink_token",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """What made a memory. It stands for the model where no model is in memory.

    Args:
        base: the base model's shape and sampled weights, see `identity.base_identity`.
        adapter_hash: 16 hex digits over the trained tensors.
        config: k, rate and the other fields of the adapter, and the name and revision of its base model.
    """

    base: dict[str, Any]
    adapter_hash: str
    config: ICAEConfig

    @classmethod
    def of(cls, icae: ICAE) -> Origin:
        """That of an ICAE as it is now. Hashes every trained tensor: 20 ms for SmolLM2 at rank 128."""
        return cls(base_identity(icae.base_model), icae.adapter_hash(), icae.config)

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> Origin:
        """That in the header of a memory file.

        Raises:
            KeyError, TypeError, ConfigError: the header lacks it, or it is none.
        """
        base, adapter_hash = header["base"], header["adapter_hash"]
        if not (isinstance(base, dict) and isinstance(adapter_hash, str) and isinstance(header["config"], dict)):
            raise TypeError("a field has the wrong type")
        return cls(base, adapter_hash, ICAEConfig.from_dict(header["config"]))

    def to_header(self) -> dict[str, Any]:
        """JSON values for `from_header`."""
        return {"config": self.config.to_dict(), "base": self.base, "adapter_hash": self.adapter_hash}

    def check(self, other: Origin, what: str) -> None:
        """Raise unless `other` is this very base model and adapter.

        Raises:
            BaseModelMismatchError: `what`, which `other` made, belongs to another base model or adapter.
        """
        if self.base != other.base:
            compare_identities(self.base, other.base, what)
        if self.adapter_hash != other.adapter_hash:
            raise BaseModelMismatchError(f"{what} was made with another adapter; pass that adapter, or compress again")


class OriginTracker:
    """The origin of an ICAE that may be trained on meanwhile; hashed again only when its adapter has changed."""

    def __init__(self, icae: ICAE) -> None:
        self.icae = icae
        self._lock = threading.Lock()
        self._known: tuple[tuple, Origin] | None = None

    def __reduce__(self) -> tuple:
        return OriginTracker, (self.icae,)

    def current(self, *, exact: bool) -> Origin:
        """The origin now.

        Args:
            exact: look at all bytes of the adapter (1.4 ms for SmolLM2 at rank 128). Otherwise only at the tensors'
                version counters, which do not see a write through `.data`.
        """
        tensors = [p for _, p in self.icae.reference_named_parameters()]
        versions = tuple((t.data_ptr(), t._version) for t in tensors)
        with self._lock:
            same = self._known is not None and self._known[0][0] == versions
            if same and not exact:
                return self._known[1]
            state = versions, fingerprint(tensors)
            if self._known is None or self._known[0] != state:
                self._known = state, Origin.of(self.icae)
            return self._known[1]


def source_hash(ids: torch.Tensor) -> str:
    """SHA-256 over token ids as little-endian int64, 64 hex digits."""
    return hashlib.sha256(ids.to(device="cpu", dtype=torch.int64).contiguous().numpy().astype("<i8")).hexdigest()


def content_key(source: str, origin: Origin, dtype: torch.dtype) -> str:
    """A key for what compressing a source gives: 32 hex digits (of SHA-256).

    Args:
        source: its `source_hash`.
        origin: base model, adapter and config.
        dtype: in which the model computes, since bf16 slots are not those of fp32.
    """
    config = origin.config.to_dict()
    parts = [source, origin.base, origin.adapter_hash, {f: config[f] for f in _SLOT_FIELDS}, str(dtype)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
