"""A chat model that is a local causal language model."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria

from icae_fast.errors import ChatModelError, TokenizerMismatchError
from training.chat.model import TOO_LONG, UNUSABLE, RequestFailed

T = TypeVar("T")


class _StopWhenCancelled(StoppingCriteria):
    """Ends generation after the current token, so that Ctrl-C need not wait for a whole batch."""

    cancelled = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.cancelled, dtype=torch.bool, device=input_ids.device)


class LocalModel:
    """A transformers model with a `generate`, which answers in batches.

    Messages go through the tokenizer's chat template; without one they stand alone, before an empty line.

    Args:
        model: the model, on the device where it is to run.
        tokenizer: its tokenizer.
        name: what records say about where an answer comes from.
        batch_size: messages answered together, `width`.
        max_answer_tokens: an answer that has not ended by then is a failure.
        temperature: sample at this temperature; None takes the likeliest tokens.

    Raises:
        TokenizerMismatchError: no token ends an answer.
    """

    def __init__(
        self,
        model: nn.Module,
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
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._eos)
        # Not the model's own, which may ask for sampling or penalties.
        self._options = GenerationConfig(
            max_new_tokens=max_answer_tokens, do_sample=bool(temperature), eos_token_id=sorted(self._eos),
            pad_token_id=pad, **({"temperature": temperature} if temperature else {}),
        )  # fmt: skip

        self._stop = _StopWhenCancelled()
        self.settings = {"dtype": str(model.dtype), "max_answer_tokens": max_answer_tokens, "temperature": temperature}

    async def __aenter__(self) -> LocalModel:
        self._stop.cancelled = False
        self._waiting: asyncio.Queue[tuple[list[int], asyncio.Future[list[int]]]] = asyncio.Queue()
        self._worker = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stop.cancelled = True
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)

    async def ask(self, message: str, parse: Callable[[str], T]) -> T:
        """`parse` of the model's reply; see `ChatModel`."""
        ids = self._encode(message)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) + self._options.max_new_tokens > limit:
            raise RequestFailed(
                TOO_LONG,
                f"{len(ids)} tokens of message and {self._options.max_new_tokens} of answer do not fit the model's "
                f"{limit} positions; shorten one of them",
                of_message=True,
            )
        future = asyncio.get_running_loop().create_future()
        await self._waiting.put((ids, future))
        answer = await future
        if not answer or answer[-1] not in self._eos:
            raise RequestFailed.cut_off(self._options.max_new_tokens)
        try:
            return parse(self.tokenizer.decode(answer, skip_special_tokens=True))
        except ValueError as error:
            raise RequestFailed(UNUSABLE, str(error), of_message=True) from error

    def _encode(self, message: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False
            )
        return self.tokenizer(message + "\n\n")["input_ids"]

    async def _serve(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self.width and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                answers = await asyncio.to_thread(self._generate, [ids for ids, _ in batch])
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):
                    error = ChatModelError(f"no memory for {len(batch)} answers at once; answer fewer together")
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                return
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    @torch.inference_mode()
    def _generate(self, rows: Sequence[list[int]]) -> list[list[int]]:
        """Ids of the answers, up to the first end-of-sequence id and with it."""
        longest = max(map(len, rows))
        device = self.model.get_input_embeddings().weight.device
        pad = self._options.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=self._options, stopping_criteria=[self._stop]
        )
        return [self._until_end(row) for row in out[:, longest:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self._eos), len(ids) - 1)
        return ids[: end + 1]
