"""The subject of an evaluation: a named adapter with its base model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from icae_fast import ICAE
from icae_fast.core.spans import count_spans
from icae_fast.errors import ConfigError, InvalidInputError, TokenizerMismatchError
from icae_fast.io.checkpoints import read_header
from icae_fast.io.hub import parse_dtype, resolve_adapter_folder
from icae_fast.store.provenance import Origin, content_key, source_hash

MEMORY_SIZES = (
    16,
    32,
    64,
    128,
    256,
)  # values of k that an adapter is measured at, besides its own, if it supports them


@dataclass
class Subject:
    """An ICAE with a name.

    The adapter must not change afterwards, because cache keys are derived from it.

    Args:
        name: name shown in tables.
        icae: the ICAE in evaluation mode. Its `adapter_mode` is set to "fused", since with "auto" a timing would decide
            how slots round.

    Raises:
        TokenizerMismatchError: the ICAE has no tokenizer, or a slow one.
    """

    name: str
    icae: ICAE

    def __post_init__(self) -> None:
        if not getattr(self.icae.tokenizer, "is_fast", False):
            raise TokenizerMismatchError(f"{self.name} has no fast tokenizer, which evaluation needs; pass tokenizer=")
        self.icae.adapter_mode = "fused"

    @cached_property
    def origin(self) -> Origin:
        """Provenance: base model, adapter and config."""
        return Origin.of(self.icae)

    @property
    def span_tokens(self) -> int:
        """Tokens of a full span: k times the compression rate."""
        return self.icae.config.max_span_tokens

    def with_memory_size(self, memory_size: int) -> Subject:
        """Return the same adapter with its first `memory_size` memory tokens; see `ICAE.with_memory_size`."""
        if memory_size == self.icae.config.memory_size:
            return self
        return Subject(self.name, self.icae.with_memory_size(memory_size))

    def n_slots(self, n_tokens: int) -> int:
        """Return the number of slots of a text of `n_tokens` tokens."""
        return count_spans(n_tokens, self.icae.config) * self.icae.config.memory_size

    def memory_sizes(self, wanted: Sequence[int] = MEMORY_SIZES) -> list[int]:
        """Return the wanted values of k that the adapter supports, and its own k, in ascending order."""
        found = {self.icae.config.memory_size}
        for size in wanted:
            with contextlib.suppress(ConfigError):
                found.add(self.icae.config.with_memory_size(size).memory_size)
        return sorted(found)

    def key(self, context: Sequence[int], *rest: Any) -> str:
        """Return a cache key for what the decoder computes from a context's slots.

        Args:
            context: ids of the context.
            rest: JSON values of everything else that determines it: the task, further ids, settings.
        """
        ids = torch.tensor(context, dtype=torch.int64)
        return _digest([content_key(source_hash(ids), self.origin, self.icae.dtype), *rest])

    def base_key(self, *rest: Any) -> str:
        """Return a cache key for what the base model computes from text, shared by all adapters."""
        return _digest([self.origin.base, str(self.icae.dtype), *rest])

    def describe(self) -> dict[str, Any]:
        """Return identifying JSON values: name, adapter, config, base model and dtype."""
        return {
            "name": self.name,
            "adapter": self.origin.adapter_hash,
            "config": self.origin.config.to_dict(),
            "base": {k: _digest(v)[:16] if k.startswith("fingerprint") else v for k, v in self.origin.base.items()},
            "dtype": str(self.icae.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class SubjectSpec:
    """A subject to load.

    Args:
        name: name shown in tables.
        adapter: a folder or hub id.
        model: name or path of the base model, None for the one in the adapter's config.
    """

    name: str
    adapter: str
    model: str | None = None


def parse_subject(text: str) -> SubjectSpec:
    """Parse `NAME=PATH@MODEL`; name (by default the path's last part) and model are optional.

    Raises:
        InvalidInputError: a part is empty.
    """
    name, named, rest = text.rpartition("=")
    adapter, at, model = rest.partition("@")
    name = name if named else Path(adapter).name
    if not (name and adapter) or (at and not model):
        raise InvalidInputError(
            f"the adapter {text!r} is not of the form NAME=PATH@MODEL; NAME= and @MODEL are optional"
        )
    return SubjectSpec(name, os.path.expanduser(adapter), os.path.expanduser(model) or None)


def load_subjects(
    specs: Sequence[SubjectSpec], model: str | None, dtype: str, rate: int | None = None
) -> list[Subject]:
    """Load adapters with their base models; adapters with the same base model share it.

    Args:
        specs: at least one spec.
        model: base model for specs without one, None for the one in the adapter's config.
        dtype: "bfloat16" or "float32".
        rate: context tokens per slot, None for each adapter's own.

    Raises:
        InvalidInputError: two specs have the same name, or the dtype is unknown.
        CheckpointError, BaseModelMismatchError, TokenizerMismatchError: see `ICAE.from_pretrained`.
    """
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInputError(f"two adapters are called {twice[0]}; name them with --adapter NAME=PATH")
    bases: dict[str | None, ICAE] = {}
    subjects = []
    for spec in specs:
        folder = resolve_adapter_folder(spec.adapter)
        base = spec.model or model or read_header(folder)[0].base_model
        known = bases.get(base)
        given = (base, None) if known is None else (known.base_model, known.tokenizer)
        icae = ICAE.from_pretrained(folder, given[0], parse_dtype(dtype), given[1], compression_rate=rate)
        bases.setdefault(base, icae)
        subjects.append(Subject(spec.name, icae))
    return subjects


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
