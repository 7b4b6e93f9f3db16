"""A chat model that is a local causal language model."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from icae_fast.errors import ChatModelError, TokenizerMismatchError
from icae_fast.generation.prompts import message_ids
from icae_fast.training.chat.model import TOO_LONG, UNUSABLE, RequestFailed
from icae_fast.training.chat.writing import writer_of

T = TypeVar("T")


class LocalModel:
    """A transformers model that answers in batches, with the writer that `writer_of` chooses.

    Messages are formatted with the tokenizer's chat template; without a template, an empty line follows the message.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        name: name of the model in records.
        batch_size: messages answered together, `width`.
        max_answer_tokens: limit of an answer; one that has not ended by then is a failure.
        temperature: sampling temperature; None decodes greedily.

    Raises:
        TokenizerMismatchError: there is no end-of-sequence token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        batch_size: int = 8,
        max_answer_tokens: int = 1024,
        temperature: float | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.width = model, tokenizer, name, batch_size
        self.retries: Counter[str] = Counter()
        own = model.generation_config.eos_token_id
        self._eos = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        if not self._eos:
            raise TokenizerMismatchError(f"neither {name} nor its tokenizer has an end-of-sequence token; set one")
        self.max_answer_tokens = max_answer_tokens
        self.writer = writer_of(model, tokenizer, sorted(self._eos), max_answer_tokens, temperature)
        self._cancelled = False
        self.settings = {
            "dtype": str(model.dtype),
            "max_answer_tokens": max_answer_tokens,
            "temperature": temperature,
            "decoder": self.writer.name,
        }

    async def __aenter__(self) -> LocalModel:
        self._cancelled = False
        self._waiting: asyncio.Queue[tuple[list[int], asyncio.Future[list[int]]]] = asyncio.Queue()
        self._worker = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._cancelled = True
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)

    async def ask(self, message: str, parse: Callable[[str], T]) -> T:
        """Return `parse` of the model's reply; see `ChatModel`."""
        ids = self._encode(message)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) + self.max_answer_tokens > limit:
            raise RequestFailed(
                TOO_LONG,
                f"{len(ids)} tokens of message and {self.max_answer_tokens} of answer do not fit the model's "
                f"{limit} positions; shorten one of them",
                of_message=True,
            )
        future = asyncio.get_running_loop().create_future()
        await self._waiting.put((ids, future))
        answer = await future
        if not answer or answer[-1] not in self._eos:
            raise RequestFailed.cut_off(self.max_answer_tokens)
        try:
            return parse(self.tokenizer.decode(answer, skip_special_tokens=True))
        except ValueError as error:
            raise RequestFailed(UNUSABLE, str(error), of_message=True) from error

    def _encode(self, message: str) -> list[int]:
        return message_ids(self.tokenizer, message)

    async def _serve(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self.width and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                answers = await asyncio.to_thread(self.writer.write, [ids for ids, _ in batch], lambda: self._cancelled)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):
                    error = ChatModelError(f"out of memory with {len(batch)} answers in a batch; use a smaller batch")
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                return
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
