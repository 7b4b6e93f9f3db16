"""Provenance of memories: `Origin` (base model, adapter, config), and keys derived from content."""

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

# Fields of the config that slots depend on. The others concern training, prompts, or where the base model is.
_SLOT_FIELDS = (
    "memory_size", "compression_rate", "lora_rank", "lora_alpha", "memory_positions", "slot_scale", "sink_token",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Provenance of a memory. It replaces the model in a process that does not load one.

    Args:
        base: shape and sampled weights of the base model, see `icae_fast.io.identity.base_identity`.
        adapter_hash: 16 hex digits over the trained tensors.
        config: the adapter's config, with the name and revision of its base model.
    """

    base: dict[str, Any]
    adapter_hash: str
    config: ICAEConfig

    @classmethod
    def of(cls, icae: ICAE) -> Origin:
        """Return the provenance of memories that an ICAE makes now.

        This hashes every trained tensor: 20 ms for SmolLM2 at rank 128.
        """
        return cls(base_identity(icae.base_model), icae.adapter_hash(), icae.config)

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> Origin:
        """Return the provenance in the header of a memory file.

        Raises:
            KeyError, TypeError, ConfigError: a field is missing or invalid.
        """
        base, adapter_hash = header["base"], header["adapter_hash"]
        if not (isinstance(base, dict) and isinstance(adapter_hash, str) and isinstance(header["config"], dict)):
            raise TypeError("a field has the wrong type")
        return cls(base, adapter_hash, ICAEConfig.from_dict(header["config"]))

    def to_header(self) -> dict[str, Any]:
        """Return JSON values for `from_header`."""
        return {"config": self.config.to_dict(), "base": self.base, "adapter_hash": self.adapter_hash}

    def check(self, other: Origin, what: str) -> None:
        """Raise unless another provenance is of the same base model and adapter.

        Args:
            other: provenance of `what`.
            what: the memory, as the subject of the message.

        Raises:
            BaseModelMismatchError: a different base model or adapter made it.
        """
        if self.base != other.base:
            compare_identities(self.base, other.base, what)
        if self.adapter_hash != other.adapter_hash:
            raise BaseModelMismatchError(f"{what} was made with another adapter; pass that adapter, or compress again")


class OriginTracker:
    """The provenance of an ICAE that may be trained meanwhile; it is hashed again only after the adapter changed."""

    def __init__(self, icae: ICAE) -> None:
        self.icae = icae
        self._lock = threading.Lock()
        self._known: tuple[tuple[Any, Any], Origin] | None = None

    def __reduce__(self) -> tuple[type[OriginTracker], tuple[ICAE]]:
        return OriginTracker, (self.icae,)

    def current(self, *, exact: bool) -> Origin:
        """Return the current provenance.

        Args:
            exact: compare all bytes of the adapter (1.4 ms for SmolLM2 at rank 128). Otherwise compare only the
                tensors' version counters, which a write through `.data` does not change.
        """
        tensors = [p for _, p in self.icae.reference_named_parameters()]
        versions = tuple((t.data_ptr(), t._version) for t in tensors)
        with self._lock:
            if self._known is not None and not exact and self._known[0][0] == versions:
                return self._known[1]
            state = versions, fingerprint(tensors)
            if self._known is None or self._known[0] != state:
                self._known = state, Origin.of(self.icae)
            return self._known[1]


def source_hash(ids: torch.Tensor) -> str:
    """Return SHA-256 over token ids as little-endian int64, 64 hex digits."""
    return hashlib.sha256(ids.to(device="cpu", dtype=torch.int64).contiguous().numpy().astype("<i8").data).hexdigest()


def content_key(source: str, origin: Origin, dtype: torch.dtype) -> str:
    """Return a key for the slots of a text, 32 hex digits of SHA-256.

    Args:
        source: `source_hash` of the text.
        origin: base model, adapter and config.
        dtype: compute dtype of the model, because bf16 slots differ from fp32 slots.
    """
    config = origin.config.to_dict()
    parts = [source, origin.base, origin.adapter_hash, {f: config[f] for f in _SLOT_FIELDS}, str(dtype)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
