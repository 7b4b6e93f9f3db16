"""Send many messages to a chat model concurrently, and stop after too many failures in a row."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from icae_fast.training.chat.model import ChatModel, RequestFailed

T = TypeVar("T")

GIVE_UP_AFTER = 20  # failed requests in a row


class GaveUp(Exception):  # noqa: N818 - never reaches a user: the run reports it
    """Too many requests in a row have failed; no further ones are sent."""


class Asker:
    """A chat model with a limit on failures in a row.

    Args:
        model: the chat model; `work` opens it.
        give_up_after: failed requests in a row after which no more are sent; failures that are due to a single message
            do not count.
    """

    def __init__(self, model: ChatModel, give_up_after: int = GIVE_UP_AFTER) -> None:
        self.model, self.give_up_after = model, give_up_after
        self._failed_in_a_row = 0
        self._failure: RequestFailed | None = None

    async def ask(self, message: str, parse: Callable[[str], T]) -> T:
        """Call `ChatModel.ask` unless too many requests in a row have failed.

        Args:
            message: the message to answer.
            parse: reads the reply; raises ValueError if it is unusable.

        Raises:
            RequestFailed: there is no usable answer.
            GaveUp: the previous requests failed, and this one is not sent.
            ChatModelError: the model cannot answer any message.
        """
        if self._failed_in_a_row >= self.give_up_after and self._failure is not None:
            raise GaveUp(
                f"the last {self.give_up_after} requests failed, the latest with {self._failure.cause!r} "
                f"({self._failure}); fix the cause and run the same command again to resume"
            )
        try:
            reply = await self.model.ask(message, parse)
        except RequestFailed as error:
            self._failure = error
            self._failed_in_a_row = 0 if error.of_message else self._failed_in_a_row + 1
            raise
        self._failed_in_a_row = 0
        return reply


async def work(jobs: Iterator[Coroutine[Any, Any, None]], model: ChatModel | None) -> None:
    """Run all jobs, `model.width` at a time; the first exception cancels the others and is raised.

    Args:
        jobs: an iterator of coroutines, consumed lazily.
        model: the chat model, open while the jobs run; None for jobs without requests.
    """
    if model is None:
        await _take(jobs)
        return
    async with model:
        await _together([_take(jobs) for _ in range(model.width)])


async def _take(jobs: Iterator[Coroutine[Any, Any, None]]) -> None:
    """Run jobs from the iterator that all workers share, until it is empty."""
    for job in jobs:
        await job
        await asyncio.sleep(0)  # a job without requests would otherwise block the other workers and Ctrl-C


async def _together(workers: Sequence[Coroutine[Any, Any, None]]) -> None:
    tasks = [asyncio.create_task(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
