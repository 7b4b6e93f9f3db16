"""How a local chat model writes its answers: by the package's own decoder, else by transformers' `generate`."""

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
    """Writes on behind rows of ids.

    Attributes:
        name: what records say about how answers were computed.
    """

    name: str

    def write(self, rows: Sequence[list[int]], cancelled: Callable[[], bool]) -> list[list[int]]:
        """What follows each row, up to the first end-of-sequence id and with it, or as many ids as there may be.

        Args:
            rows: ids to read.
            cancelled: asked every few tokens; once it says True, what is returned does not count.
        """


def writer_of(
    model: nn.Module, tokenizer: Any, eos: Sequence[int], max_new_tokens: int, temperature: float | None
) -> Writer:
    """The fastest writer that there is for a model.

    Args:
        model: a causal language model of transformers. The package's decoder freezes it.
        tokenizer: its tokenizer.
        eos: ids that end a row.
        max_new_tokens: the most ids of an answer, that of its end included.
        temperature: sample at this temperature; None takes the likeliest tokens.
    """
    try:
        icae = ICAE(model, ICAEConfig(memory_size=1, lora_rank=1))
    except UnsupportedModelError as error:
        log.warning("answers come from transformers' generate, since %s", error)
        return TransformersWriter(model, tokenizer, eos, max_new_tokens, temperature)
    return OwnWriter(icae, eos, max_new_tokens, temperature)


def rows_behind_text(
    icae: ICAE, texts: Sequence[tuple[Sequence[int], Sequence[int]]], limits: Sequence[int]
) -> list[Row]:
    """Rows of an `AnswerBatch` that read text in place of slots.

    Args:
        icae: whose base model reads.
        texts: of each row, ids that are read once for all rows that begin with the same, and the other ids.
        limits: most new tokens of each.
    """
    nothing = Memory(torch.empty(0, icae.backbone.hidden_size), 0, ())
    return [
        Row(i, nothing, list(prefix), list(suffix), [], limit)
        for i, ((prefix, suffix), limit) in enumerate(zip(texts, limits, strict=True))
    ]


class OwnWriter:
    """The package's decoder, which reads text as it reads a prompt behind slots.

    Rows that have ended leave the batch, and none is padded; `make bench-decode` compares it with `generate`.

    Args:
        icae: of the model, with any adapter, which is not used.
        eos, max_new_tokens, temperature: see `writer_of`.
    """

    name = "icae-fast"

    def __init__(self, icae: ICAE, eos: Sequence[int], max_new_tokens: int, temperature: float | None) -> None:
        self.icae, self.max_new_tokens = icae, max_new_tokens
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
        self._options = GenerationOptions(eos_token_id=sorted(eos), **sampling)

    def write(self, rows: Sequence[list[int]], cancelled: Callable[[], bool]) -> list[list[int]]:
        """See `Writer`."""
        started = rows_behind_text(self.icae, [((), ids) for ids in rows], [self.max_new_tokens] * len(rows))
        for _ in AnswerBatch(self.icae, started, 0, self._options).run():
            if cancelled():
                break
        return [row.ids for row in started]


class TransformersWriter:
    """`generate`, for models that the package's decoder does not know.

    Args: see `writer_of`.
    """

    name = "transformers"

    def __init__(
        self, model: nn.Module, tokenizer: Any, eos: Sequence[int], max_new_tokens: int, temperature: float | None
    ) -> None:
        self.model, self._eos = model, frozenset(eos)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos)
        # Not the model's own, which may ask for sampling or penalties.
        self._options = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=bool(temperature), eos_token_id=sorted(eos),
            pad_token_id=self._pad, **({"temperature": temperature} if temperature else {}),
        )  # fmt: skip

    @torch.inference_mode()
    def write(self, rows: Sequence[list[int]], cancelled: Callable[[], bool]) -> list[list[int]]:
        """See `Writer`."""
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
    """Ends generation after the current token, so that Ctrl-C need not wait for a whole batch."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self.cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.cancelled(), dtype=torch.bool, device=input_ids.device)
