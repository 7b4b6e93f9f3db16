"""What is evaluated: an adapter on its base model, under a name."""

from __future__ import annotations

import contextlib
import hashlib
import json
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

MEMORY_SIZES = (16, 32, 64, 128, 256)  # k at which an adapter is measured beside its own, where it can have them


@dataclass
class Subject:
    """An ICAE under the name that tables show.

    Its adapter is fixed from here on: what was computed is known by it.

    Args:
        name: shown in tables.
        icae: in evaluation mode. Its `adapter_mode` becomes "fused", since "auto" lets a timing decide how slots round.

    Raises:
        TokenizerMismatchError: the ICAE has no tokenizer, or a slow one.
    """

    name: str
    icae: ICAE

    def __post_init__(self) -> None:
        if not getattr(self.icae.tokenizer, "is_fast", False):
            raise TokenizerMismatchError(f"{self.name} has no fast tokenizer, and texts are evaluated; pass tokenizer=")
        self.icae.adapter_mode = "fused"

    @cached_property
    def origin(self) -> Origin:
        """Base model, adapter and config."""
        return Origin.of(self.icae)

    @property
    def span_tokens(self) -> int:
        """Tokens of a full span, k times the rate."""
        return self.icae.config.max_span_tokens

    def with_memory_size(self, memory_size: int) -> Subject:
        """The same adapter with its first `memory_size` memory tokens; see `ICAE.with_memory_size`."""
        if memory_size == self.icae.config.memory_size:
            return self
        return Subject(self.name, self.icae.with_memory_size(memory_size))

    def n_slots(self, n_tokens: int) -> int:
        """Slots of a text of so many tokens."""
        return count_spans(n_tokens, self.icae.config) * self.icae.config.memory_size

    def memory_sizes(self, wanted: Sequence[int] = MEMORY_SIZES) -> list[int]:
        """Those of the wanted numbers of slots a span that the adapter can have, and its own k, rising."""
        found = {self.icae.config.memory_size}
        for size in wanted:
            with contextlib.suppress(ConfigError):
                found.add(self.icae.config.with_memory_size(size).memory_size)
        return sorted(found)

    def key(self, context: Sequence[int], *rest: Any) -> str:
        """A key for what the decoder makes of a context's slots.

        Args:
            context: its ids.
            rest: JSON values that tell what else decides about it: the task, further ids, settings.
        """
        ids = torch.tensor(context, dtype=torch.int64)
        return _digest([content_key(source_hash(ids), self.origin, self.icae.dtype), *rest])

    def base_key(self, *rest: Any) -> str:
        """A key for what the base model makes of text, the same for all adapters."""
        return _digest([self.origin.base, str(self.icae.dtype), *rest])

    def describe(self) -> dict[str, Any]:
        """JSON values that identify it: name, adapter, config, base model and dtype."""
        return {
            "name": self.name,
            "adapter": self.origin.adapter_hash,
            "config": self.origin.config.to_dict(),
            "base": {k: v for k, v in self.origin.base.items() if k != "fingerprint"}
            | {"fingerprint": _digest(self.origin.base["fingerprint"])[:16]},
            "dtype": str(self.icae.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class SubjectSpec:
    """A subject to be loaded.

    Args:
        name: shown in tables.
        adapter: a folder or hub id.
        model: name or path of the base model, None for the one that the adapter names.
    """

    name: str
    adapter: str
    model: str | None = None


def parse_subject(text: str) -> SubjectSpec:
    """The spec of `NAME=PATH@MODEL`, where name and model may be left out; the name is then the path's last part.

    Raises:
        InvalidInputError: a part is empty.
    """
    name, named, rest = text.rpartition("=")
    adapter, at, model = rest.partition("@")
    name = name if named else Path(adapter).name
    if not (name and adapter) or (at and not model):
        raise InvalidInputError(
            f"the adapter {text!r} is not of the form NAME=PATH@MODEL; name and model may be left out"
        )
    return SubjectSpec(name, adapter, model or None)


def load_subjects(
    specs: Sequence[SubjectSpec], model: str | None, dtype: str, rate: int | None = None
) -> list[Subject]:
    """Adapters with their base models; those that name the same base model share it.

    Args:
        specs: at least one.
        model: base model of those that do not give one, None for the one that the adapter names.
        dtype: "bfloat16" or "float32".
        rate: context tokens a slot, None for each adapter's own.

    Raises:
        InvalidInputError: two have one name, or an unknown dtype.
        CheckpointError, BaseModelMismatchError, TokenizerMismatchError: see `ICAE.from_pretrained`.
    """
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInputError(f"two adapters are called {twice[0]}; give names, as in --adapter NAME=PATH")
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
