"""Decode a local chat model's answers with icae_fast's decoder, or with transformers' `generate`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria

from icae_fast import ICAE, ICAEConfig
from icae_fast.core.memory import Memory
from icae_fast.errors import UnsupportedModelError
from icae_fast.generation.answers import AnswerBatch, Row
from icae_fast.generation.sampling import GenerationOptions

log = logging.getLogger(__name__)


class Writer(Protocol):
    """A decoder that continues rows of ids.

    Attributes:
        name: name of the decoder in records.
    """

    name: str

    def write(self, rows: Sequence[list[int]], cancelled: Callable[[], bool]) -> list[list[int]]:
        """Return the continuation of each row, up to and including the first end-of-sequence id or up to the limit.

        Args:
            rows: ids to continue.
            cancelled: checked every few tokens; once it returns True, decoding stops and the result is ignored.
        """


def writer_of(
    model: nn.Module, tokenizer: Any, eos: Sequence[int], max_new_tokens: int, temperature: float | None
) -> Writer:
    """Return the fastest writer that supports a model.

    Args:
        model: a causal language model of transformers; icae_fast's decoder freezes it.
        tokenizer: its tokenizer.
        eos: ids that end a row.
        max_new_tokens: limit of an answer, the end-of-sequence id included.
        temperature: sampling temperature; None decodes greedily.
    """
    try:
        icae = ICAE(model, ICAEConfig(memory_size=1, lora_rank=1))
    except UnsupportedModelError as error:
        log.warning("decoding with transformers' generate, because %s", error)
        return TransformersWriter(model, tokenizer, eos, max_new_tokens, temperature)
    return OwnWriter(icae, eos, max_new_tokens, temperature)


def rows_behind_text(
    icae: ICAE, texts: Sequence[tuple[Sequence[int], Sequence[int]]], limits: Sequence[int]
) -> list[Row]:
    """Return rows of an `AnswerBatch` that read text instead of slots.

    Args:
        icae: its base model reads the text.
        texts: (prefix ids, suffix ids) of each row; a prefix shared by several rows is read once.
        limits: maximum new tokens of each row.
    """
    nothing = Memory(torch.empty(0, icae.backbone.hidden_size), 0, ())
    return [
        Row(i, nothing, list(prefix), list(suffix), [], limit)
        for i, ((prefix, suffix), limit) in enumerate(zip(texts, limits, strict=True))
    ]


class OwnWriter:
    """icae_fast's decoder, which reads text as it reads a prompt after slots.

    Rows leave the batch when they end, and no row is padded; `make bench-decode` compares it with `generate`.

    Args:
        icae: the model with any adapter; the adapter is not used.
        eos, max_new_tokens, temperature: see `writer_of`.
    """

    name = "icae-fast"

    def __init__(self, icae: ICAE, eos: Sequence[int], max_new_tokens: int, temperature: float | None) -> None:
        self.icae, self.max_new_tokens = icae, max_new_tokens
        self._options = GenerationOptions(
            do_sample=bool(temperature), temperature=temperature or 1.0, eos_token_id=sorted(eos)
        )

    def write(self, rows: Sequence[list[int]], cancelled: Callable[[], bool]) -> list[list[int]]:
        """Continue each row; see `Writer`."""
        started = rows_behind_text(self.icae, [((), ids) for ids in rows], [self.max_new_tokens] * len(rows))
        for _ in AnswerBatch(self.icae, started, 0, self._options).run():
            if cancelled():
                break
        return [row.ids for row in started]


class TransformersWriter:
    """transformers' `generate`, for models that icae_fast's decoder does not support.

    Args:
        model, tokenizer, eos, max_new_tokens, temperature: see `writer_of`.
    """

    name = "transformers"

    def __init__(
        self, model: Any, tokenizer: Any, eos: Sequence[int], max_new_tokens: int, temperature: float | None
    ) -> None:
        self.model, self._eos = model, frozenset(eos)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos)
        # The model's default config may enable sampling or penalties.
        self._options = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=bool(temperature), eos_token_id=sorted(eos),
            pad_token_id=self._pad, **({"temperature": temperature} if temperature else {}),
        )  # fmt: skip

    @torch.inference_mode()
    def write(self, rows: Sequence[list[int]], cancelled: Callable[[], bool]) -> list[list[int]]:
        """Continue each row; see `Writer`."""
        longest = max(map(len, rows))
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=self._options,
            stopping_criteria=[_StopWhen(cancelled)],
        )  # fmt: skip
        return [self._until_end(row) for row in out[:, longest:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self._eos), len(ids) - 1)
        return ids[: end + 1]


class _StopWhen(StoppingCriteria):
    """A criterion that ends generation after the current token, so that Ctrl-C need not wait for a whole batch."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self.cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.cancelled(), dtype=torch.bool, device=input_ids.device)
