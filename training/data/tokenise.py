"""Texts become token ids, once: rows of ids in the Arrow cache of `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from icae_fast.errors import CacheError, DataError, ICAEError, TokenizerMismatchError
from icae_fast.training.data.records import Record

CACHE_VERSION = 1  # of the columns below; another one tokenises anew
_ROWS, _CHARACTERS = 1024, 1 << 20  # the most that is tokenised in one call
_WRITTEN_ROWS = 256  # kept in memory until they are written: rows may be whole books


class Tokenise:
    """Turns a batch of records into rows of token ids: what `datasets` maps over.

    Args:
        tokenizer: a fast one.
        fields: text fields of a row.

    Raises:
        TokenizerMismatchError: the tokenizer is missing or slow.
    """

    def __init__(self, tokenizer: Any, fields: tuple[str, ...]) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerMismatchError(
                f"training data needs a fast tokenizer, and this one is {type(tokenizer).__name__}; load it with "
                "AutoTokenizer.from_pretrained"
            )
        self.tokenizer = tokenizer
        self.fields = fields

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list]:
        problems = list(batch["problem"])
        columns = {}
        for i, name in enumerate(self.fields):
            texts = list(batch[name])
            # As the reference does: the context with the tokenizer's special tokens, the others without.
            ids = self.tokenizer(
                texts, add_special_tokens=i == 0, return_attention_mask=False, truncation=False, verbose=False
            )["input_ids"]
            for j, row in enumerate(ids):
                if not row and not problems[j]:
                    problems[j] = f"field {name!r} has no tokens"
            columns[ids_column(name)] = ids
        for column in columns.values():
            column[:] = [[] if problem else ids for ids, problem in zip(column, problems, strict=True)]
        return {"origin": list(batch["origin"]), "problem": problems, **columns}

    def features(self) -> datasets.Features:
        """Columns of the result."""
        text, ids = datasets.Value("string"), datasets.List(datasets.Value("int32"))
        return datasets.Features({"origin": text, "problem": text, **{ids_column(n): ids for n in self.fields}})

    def version(self) -> str:
        """A hash of all that decides which ids a text becomes."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        backend.pop("truncation"), backend.pop("padding")  # set anew at every call
        return Hasher.hash([CACHE_VERSION, list(self.fields), json.dumps(backend, sort_keys=True)])


def ids_column(name: str) -> str:
    """The column of a text field's ids."""
    return f"{name}_ids"


def tokenise_once(
    name: str, records: Iterable[Record], identity: Any, tokenise: Tokenise, cache_folder: str | None
) -> datasets.Dataset:
    """All records as rows of ids, memory-mapped from the disk.

    They are read, and tokenised, only if no earlier call wrote rows of the same identity, tokenizer and fields into
    the cache. Processes that ask at the same time wait for the first.

    Args:
        name: of the data, for messages.
        records: read when it is iterated.
        identity: JSON values that change when the records do.
        tokenise: gives the rows.
        cache_folder: None for the default of `datasets`.

    Raises:
        CacheError: the cache cannot be written.
        DataError: there is no record at all, or whatever `records` raises.
    """

    def rows() -> Iterator[dict[str, Any]]:
        batch = None
        for batch in _batches(records, tokenise.fields):
            columns = tokenise({key: [r[key] for r in batch] for key in batch[0]})
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
        if batch is None:
            raise DataError(f"{name} gives no row that can be used: it is empty")

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
            f"cannot write the tokenised rows into {folder}: {cause}; make room, or choose another cache folder"
        ) from error


def _batches(records: Iterable[Record], fields: Sequence[str]) -> Iterator[list[Record]]:
    """Runs of records that are tokenised together."""
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += sum(len(record[name]) for name in fields)
        if len(batch) == _ROWS or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
