"""Typed errors for bad input and failed operations, one class for each kind of mistake.

All derive from `ICAEError`, so that a caller can catch this package's errors separately. Each message says what is
wrong and what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ICAEError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(ICAEError, ValueError):
    """A field of `ICAEConfig` is out of range or unknown, or does not fit the base model."""


class InvalidInputError(ICAEError, ValueError):
    """The text, token ids, prompts, labels or options passed in cannot be used."""


class SomeFailedError(InvalidInputError):
    """Some contexts of a call could not be compressed; all others are compressed and stored.

    Args:
        message: says which and why.
        memories: a `Memory` for each context, None for one that failed.
        failures: the error of each context that failed, by its place.
    """

    def __init__(self, message: str, memories: Sequence[Any], failures: Mapping[int, ICAEError]) -> None:
        super().__init__(message)
        self.memories, self.failures = list(memories), dict(failures)

    def __reduce__(self) -> tuple[type[SomeFailedError], tuple[str, list[Any], dict[int, ICAEError]]]:
        return type(self), (str(self), self.memories, self.failures)


class ContextTooLongError(InvalidInputError):
    """A context or prompt exceeds the base model's positions or the available memory."""


class UnsupportedModelError(ICAEError, TypeError):
    """The base model's architecture, or the type of one of its layers, is not supported."""


class CheckpointError(ICAEError, ValueError):
    """A checkpoint or memory file is truncated, damaged or incomplete, or has unknown or misshaped tensors."""


class BaseModelMismatchError(CheckpointError):
    """The adapter or the memory belongs to a different base model or a different adapter."""


class TokenizerMismatchError(ICAEError, ValueError):
    """Text is used without a tokenizer, or the tokenizer does not belong to the base model."""


class DataError(ICAEError, ValueError):
    """Training or evaluation data cannot be found or read, or has unusable rows."""


class NonFiniteError(ICAEError, ArithmeticError):
    """Weights or results contain NaN or infinity."""


class CacheFolderError(ICAEError, OSError):
    """The folder for converted models or tokenised rows cannot be written, or its content is damaged."""


CacheError = CacheFolderError  # the public name of version 0.1


class MissingPackageError(ICAEError, ImportError):
    """An optional Python package is not installed; the message has the command that installs it."""


class StoreError(ICAEError, OSError):
    """A memory store cannot be used, or its index is damaged or locked."""


class MemoryNotFoundError(ICAEError, KeyError):
    """A memory store has no entry under this key."""

    __str__ = Exception.__str__  # KeyError shows the repr of its message


class OutputError(ICAEError, OSError):
    """An output file cannot be opened or written, or another process is writing it."""


class ChatModelError(ICAEError, RuntimeError):
    """A chat model (teacher or judge) cannot be reached, or refuses every request."""


class BackendError(ICAEError, RuntimeError):
    """A required compiled backend is missing, or does not support the arguments of the call."""
