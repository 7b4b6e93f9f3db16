"""Tokenisation of texts, done once: rows of ids in the Arrow cache of `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from icae_fast.core.tokens import SpecialTokens, control_tokens, encode_texts, is_mistral_common
from icae_fast.errors import CacheError, DataError, ICAEError, TokenizerMismatchError
from icae_fast.training.data.records import Record

CACHE_VERSION = 2  # version of the columns below; a change tokenises everything again
_ROWS, _CHARACTERS = 1024, 1 << 20  # limits of one call of the tokenizer
_WRITTEN_ROWS = 256  # rows held in memory before a write: a row may be a whole book


class Tokenise:
    """A function for `datasets` that maps a batch of records to rows of token ids.

    Args:
        tokenizer: a fast tokenizer, or one of mistral-common.
        fields: text fields of a row.
        special_tokens: see `icae_fast.core.tokens.encode_text`.

    Raises:
        TokenizerMismatchError: the tokenizer is missing or slow.
    """

    def __init__(self, tokenizer: Any, fields: tuple[str, ...], special_tokens: SpecialTokens = "text") -> None:
        if not getattr(tokenizer, "is_fast", False) and not is_mistral_common(tokenizer):
            raise TokenizerMismatchError(
                f"training data needs a fast tokenizer, and this one is {type(tokenizer).__name__}; load it with "
                "AutoTokenizer.from_pretrained"
            )
        self.tokenizer = tokenizer
        self.fields = fields
        self.special_tokens: SpecialTokens = special_tokens

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list]:
        problems = list(batch["problem"])
        columns = {}
        for i, name in enumerate(self.fields):
            texts = list(batch[name])
            # As in the reference: special tokens for the context, none for the other fields.
            ids = encode_texts(
                self.tokenizer, texts, batch["origin"], add_special_tokens=i == 0, special_tokens=self.special_tokens
            )
            for j, row in enumerate(ids):
                if not row and not problems[j]:
                    problems[j] = f"field {name!r} has no tokens"
            columns[ids_column(name)] = ids
        for column in columns.values():
            column[:] = [[] if problem else ids for ids, problem in zip(column, problems, strict=True)]
        return {"origin": list(batch["origin"]), "problem": problems, **columns}

    def features(self) -> datasets.Features:
        """Return the columns of the result."""
        text, ids = datasets.Value("string"), datasets.List(datasets.Value("int32"))
        return datasets.Features({"origin": text, "problem": text, **{ids_column(n): ids for n in self.fields}})

    def version(self) -> str:
        """Return a hash of everything that determines a text's ids."""
        backend: Any
        if is_mistral_common(self.tokenizer):
            backend = self.tokenizer.get_vocab()
        else:
            backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
            backend.pop("truncation"), backend.pop("padding")  # set at every call
        control = sorted(control_tokens(self.tokenizer).items()) if self.special_tokens == "text" else "control"
        return Hasher.hash([CACHE_VERSION, list(self.fields), json.dumps(backend, sort_keys=True), control])


def ids_column(name: str) -> str:
    """Return the name of the column of a text field's ids."""
    return f"{name}_ids"


def tokenise_once(
    name: str, records: Iterable[Record], identity: Any, tokenise: Tokenise, cache_folder: str | None
) -> datasets.Dataset:
    """Return all records as rows of ids, memory-mapped from the disk.

    Records are read and tokenised only if the cache has no rows of the same identity, tokenizer and fields. Concurrent
    processes wait for the first one.

    Args:
        name: name of the data, for messages.
        records: iterable of records, read only when needed.
        identity: JSON values that change when the records do.
        tokenise: makes rows of records.
        cache_folder: folder of the cache, None for the default of `datasets`.

    Raises:
        CacheError: the cache cannot be written.
        DataError: there is no record, or iterating `records` raises it.
    """

    def rows() -> Iterator[dict[str, Any]]:
        batch = None
        for batch in _batches(records, tokenise.fields):
            columns = tokenise({key: [r[key] for r in batch] for key in batch[0]})
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
        if batch is None:
            raise DataError(f"{name} has no usable row: it is empty")

    try:
        return datasets.Dataset.from_generator(
            rows,
            features=tokenise.features(),
            cache_dir=cache_folder,
            fingerprint=Hasher.hash([tokenise.version(), json.dumps(identity)]),
            writer_batch_size=_WRITTEN_ROWS,
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, ICAEError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        folder = cache_folder or datasets.config.HF_DATASETS_CACHE
        raise CacheError(
            f"cannot write the tokenised rows into {folder}: {cause}; free space, or choose another cache folder"
        ) from error


def _batches(records: Iterable[Record], fields: Sequence[str]) -> Iterator[list[Record]]:
    """Yield lists of records that are tokenised together."""
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += sum(len(record[name]) for name in fields)
        if len(batch) == _ROWS or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
