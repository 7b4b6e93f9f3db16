"""Compressing many contexts into a store: what is done is stored at once, and a bad context stops no other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from icae_fast.core.compress import compress_cut, context_batches
from icae_fast.core.inputs import Context, as_list
from icae_fast.core.memory import Memory, SlotKV
from icae_fast.core.spans import CutContext
from icae_fast.errors import (
    BaseModelMismatchError,
    CheckpointError,
    ContextTooLongError,
    ICAEError,
    InvalidInputError,
    MemoryNotFoundError,
    SomeFailedError,
    TokenizerMismatchError,
)
from icae_fast.model.icae import ICAE
from icae_fast.store.memory_file import PackedMemory
from icae_fast.store.provenance import Origin, content_key, source_hash
from icae_fast.store.quantize import SlotDtype

log = logging.getLogger(__name__)


class Compressed(NamedTuple):
    """What became of a context: its memory, or the error that says why there is none.

    Args:
        place: of the context in the call.
        name: of the context, as in messages.
        key: of the entry, or None if the context cannot be tokenised.
        memory: None if there is an error.
        error: None if there is a memory.
    """

    place: int
    name: str
    key: str | None
    memory: Memory | None
    error: ICAEError | None


class _Cut(NamedTuple):
    place: int
    name: str
    key: str
    source: str
    context: CutContext

    def done(self, memory: Memory | None, error: ICAEError | None = None) -> Compressed:
        return Compressed(self.place, self.name, self.key, memory, error)


class Job:
    """Contexts to be compressed into a store.

    Args:
        icae: the model.
        origin: its provenance.
        dtype: of slots in the store.
        find: returns the memory of a key, or raises MemoryNotFoundError or CheckpointError.
        write: stores entries, each with its key.
        kv: store keys and values, too.
    """

    def __init__(
        self, icae: ICAE, origin: Origin, dtype: SlotDtype | None, find: Callable[[str], Memory],
        write: Callable[[Mapping[str, bytes | bytearray]], None], kv: bool,
    ) -> None:  # fmt: skip
        self._icae, self._origin, self._dtype, self._kv = icae, origin, dtype, kv
        self._find, self._write = find, write

    def run(
        self, contexts: Context | Sequence[Context], names: Sequence[str] | None, token_budget: int | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> Iterator[Compressed]:  # fmt: skip
        """Yield each context when its memory is stored, found or impossible; see `MemoryStore.compress_each`."""
        listed = as_list(contexts)
        called = [f"context {i}" for i in range(len(listed))] if names is None else [str(name) for name in names]
        if len(called) != len(listed):
            raise InvalidInputError(f"there are {len(called)} names for {len(listed)} contexts; give one for each")
        missing: dict[str, list[_Cut]] = {}
        for place, (context, name) in enumerate(zip(listed, called, strict=True)):
            try:
                cut = self._cut(place, name, context)
            except (InvalidInputError, TokenizerMismatchError) as error:
                yield Compressed(place, name, None, None, error)
                continue
            if cut.key in missing:
                missing[cut.key].append(cut)
                continue
            try:
                memory = self._found(cut)
            except BaseModelMismatchError as error:
                yield cut.done(None, error)
                continue
            if memory is None:
                missing[cut.key] = [cut]
            else:
                yield cut.done(memory)
        yield from self._compressed(list(missing.values()), token_budget, on_progress)

    def _cut(self, place: int, name: str, context: Context) -> _Cut:
        cut = self._icae.cut_context(context, name)
        source = source_hash(cut.ids)
        return _Cut(place, name, content_key(source, self._origin, self._icae.dtype), source, cut)

    def _found(self, cut: _Cut) -> Memory | None:
        try:
            return self._find(cut.key)
        except MemoryNotFoundError:
            return None
        except BaseModelMismatchError:
            raise
        except CheckpointError as error:
            log.warning("%s is compressed again: %s", cut.name, error)
            return None

    def _compressed(
        self, groups: list[list[_Cut]], token_budget: int | None, on_progress: Callable[[int, int], None] | None
    ) -> Iterator[Compressed]:
        contexts = [group[0].context for group in groups]
        done, total = 0, sum(len(context.ids) for context in contexts)
        for batch in context_batches(self._icae, contexts, token_budget):
            chosen = contexts[batch.start : batch.stop]
            progress = None if on_progress is None else _shifted(on_progress, done, total)
            memories: Sequence[Memory | None]
            error: ICAEError | None = None
            try:
                memories = self._stored(
                    groups[batch.start : batch.stop],
                    compress_cut(self._icae, chosen, token_budget=token_budget, on_progress=progress),
                )
            except ContextTooLongError as caught:  # memory ran out; others may fit
                memories, error = [None] * len(chosen), caught
            done += sum(len(context.ids) for context in chosen)
            for group, memory in zip(groups[batch.start : batch.stop], memories, strict=True):
                for cut in group:
                    yield cut.done(memory, error)

    def _stored(self, groups: Sequence[Sequence[_Cut]], made: Sequence[Memory]) -> list[Memory]:
        """Write the entries of a batch and return their memories as `get` would."""
        packed = [PackedMemory.of(memory, self._dtype) for memory in made]
        memories = [p.memory() for p in packed]
        entries: dict[str, bytes | bytearray] = {}
        for group, p, memory in zip(groups, packed, memories, strict=True):
            kv: SlotKV | None = self._icae.memory_kv(memory) if self._kv else None
            key, source = group[0].key, group[0].source
            entries[key] = p.encode(self._origin, kv=kv, key=key, source_hash=source)
            if kv is not None:  # large: written one by one
                self._write(entries)
                entries = {}
        if entries:
            self._write(entries)
        return memories


def _shifted(on_progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: on_progress(before + done, total)


def memories_of(results: Sequence[Compressed]) -> list[Memory]:
    """Return the memories in the order of contexts.

    Raises:
        SomeFailedError: some contexts failed.
        ICAEError: all failed; this is the first one's error.
    """
    ordered: list[Any] = [None] * len(results)
    for result in results:
        ordered[result.place] = result.memory
    failures = {r.place: r.error for r in sorted(results) if r.error is not None}
    if len(failures) == len(results):
        raise next(iter(failures.values()))
    if failures:
        reasons = "; ".join(dict.fromkeys(str(error) for error in failures.values()))
        raise SomeFailedError(
            f"{len(failures)} of {len(results)} contexts could not be compressed, the others are stored: {reasons}",
            ordered, failures,
        )  # fmt: skip
    return ordered
