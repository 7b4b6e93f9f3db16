"""Every error that bad input can cause, one class for each kind of mistake.

All derive from `ICAEError`, so that a caller can catch the package's errors alone; each message says
what was found and what to do about it.
"""


class ICAEError(Exception):
    """Base class of all errors raised on purpose by this package."""


class ConfigError(ICAEError, ValueError):
    """A field of `ICAEConfig` is out of range or unknown, or does not fit the base model."""


class InvalidInputError(ICAEError, ValueError):
    """The text, token ids, prompts or labels given cannot be used."""


class ContextTooLongError(InvalidInputError):
    """A context or prompt needs more positions than the base model has, or more memory than there is."""


class UnsupportedModelError(ICAEError, TypeError):
    """The base model's architecture, or the kind of one of its layers, is not supported."""


class CheckpointError(ICAEError, ValueError):
    """A checkpoint or memory is truncated, damaged, incomplete, misshaped or carries something unknown."""


class BaseModelMismatchError(CheckpointError):
    """The adapter or the memory was made with another base model or another adapter."""


class TokenizerMismatchError(ICAEError, ValueError):
    """The tokenizer is missing where text is used, or does not belong to the base model."""


class DataError(ICAEError, ValueError):
    """Training or evaluation data cannot be found or read, or holds rows that cannot be used."""


class NonFiniteError(ICAEError, ArithmeticError):
    """Weights or results hold NaN or infinity."""


class CacheError(ICAEError, OSError):
    """The cache folder cannot be written, or what it holds is damaged."""


class StoreError(ICAEError, OSError):
    """A memory store's folder cannot be used, or its index is damaged or busy."""


class MemoryNotFoundError(ICAEError, KeyError):
    """A memory store has no entry under this key."""

    __str__ = Exception.__str__  # KeyError's shows the message's repr


class OutputError(ICAEError, OSError):
    """A file that results are written to cannot be opened or written, or another process is writing it."""


class ChatModelError(ICAEError, RuntimeError):
    """A chat model, a teacher or a judge, cannot be reached, or refuses every request."""


class BackendError(ICAEError, RuntimeError):
    """An op's compiled backend is missing where it was required, or was called with what it cannot do."""
