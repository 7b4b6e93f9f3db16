"""Checks of a memory file's header against its tensors, before anything is made of either."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from icae_fast.checks import is_int
from icae_fast.errors import CheckpointError
from icae_fast.store.provenance import Origin

FORMAT_VERSION = 2
_FLOATS = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def check_header(header: Any, tensors: Shapes, what: str) -> Origin:
    """Return the provenance in a header that this version of the package can read and that fits the tensors.

    Args:
        header: JSON values, see `memory_file.PackedMemory.encode`.
        tensors: dtype and shape of each tensor of the file.
        what: name of the file in error messages.

    Raises:
        CheckpointError: the file is of a newer version, is no memory file, or contradicts itself.
    """
    try:
        version = header["format_version"]
        if is_int(version) and version > FORMAT_VERSION:
            raise CheckpointError(f"{what} has format version {version}; install a newer icae-fast to read it")
        if not (is_int(version) and version > 0):
            raise TypeError("no version")
        origin = Origin.from_header(header)
        n_spans = _n_spans(header["n_source_tokens"], header["span_lengths"])
        shape = (n_spans * origin.config.memory_size, origin.base["hidden_size"])
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what} is no memory file; make one with `icae-fast compress`") from error
    problem = _slots_problem(header, tensors, shape)
    if problem is None and version > 1:
        problem = _kv_problem(header, tensors, origin, shape[0]) or _fields_problem(header)
    if problem is not None:
        raise CheckpointError(f"{what} is damaged: {problem}; delete it and compress its text again")
    return origin


def _n_spans(n_tokens: Any, spans: Any) -> int:
    """Return the number of spans; TypeError or ValueError if the lengths are not those of a context."""
    if not (isinstance(spans, list) and spans and all(is_int(n) and n > 0 for n in spans) and is_int(n_tokens)):
        raise TypeError("no span lengths")
    if sum(spans) != n_tokens:
        raise ValueError("the span lengths are of another context")
    return len(spans)


def _slots_problem(header: Mapping[str, Any], tensors: Shapes, shape: tuple[int, Any]) -> str | None:
    if "slots" not in tensors:
        return "it has no slots"
    dtype, found = tensors["slots"]
    if found != shape:
        return f"its slots are {found}, and its header is of slots {shape}"
    names = {"slots"}
    if dtype == torch.int8:
        names.add("slots_scale")
        scale, n_rows = tensors.get("slots_scale", (None, ()))
        if scale not in (torch.float32, torch.float64) or n_rows != found[:1]:
            return "it lacks a scale for each slot"
    elif dtype not in _FLOATS.values():
        return f"its slots are {dtype}"
    if header["format_version"] > 1:
        stated = header.get("slots_dtype")
        read = _FLOATS.get(stated) if isinstance(stated, str) else None
        if read is None or (dtype != torch.int8 and read != dtype):
            return f"its header says that its slots are {stated!r}, and they are {dtype}"
        names |= {"keys", "values"}
    strange = sorted(tensors.keys() - names)
    return f"it has tensors that no memory has: {', '.join(strange[:3])}" if strange else None


def _kv_problem(header: Mapping[str, Any], tensors: Shapes, origin: Origin, n_slots: int) -> str | None:
    prefix, found = header.get("kv_prefix_ids"), [tensors[n] for n in ("keys", "values") if n in tensors]
    if prefix is None and not found:
        return None
    if not (isinstance(prefix, list) and all(is_int(i) and i >= 0 for i in prefix) and len(found) == 2):
        return "it has keys and values in part"
    (dtype, keys), values = found[0], found[1]
    wanted = (origin.base.get("num_hidden_layers"), origin.base.get("num_key_value_heads"), n_slots)
    if (dtype, keys) != values or dtype not in _FLOATS.values() or len(keys) != 4 or keys[:3] != wanted:
        return f"its keys and values are {keys} and {values[1]}, and its header is of layers, heads and slots {wanted}"
    return None


def _fields_problem(header: Mapping[str, Any]) -> str | None:
    created = header.get("created")
    texts = all(isinstance(header.get(name), (str, type(None))) for name in ("key", "source_hash"))
    number = isinstance(created, (int, float)) and not isinstance(created, bool) and math.isfinite(created)
    if "key" not in header or not texts or not (created is None or number):
        return "its header lacks its key or its time"
    return None
