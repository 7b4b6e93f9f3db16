"""Asks a chat model many things at the same time, and stops when nothing works any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from icae_fast.training.chat.model import ChatModel, RequestFailed

T = TypeVar("T")

GIVE_UP_AFTER = 20  # requests in a row


class GaveUp(Exception):  # noqa: N818 - never reaches a user: the run reports it
    """So many requests in a row have failed that others are not tried."""


class Asker:
    """A chat model, with an eye on failures in a row.

    Args:
        model: answers; it is opened by `work`.
        give_up_after: requests in a row, failures of single messages not counted.
    """

    def __init__(self, model: ChatModel, give_up_after: int = GIVE_UP_AFTER) -> None:
        self.model, self.give_up_after = model, give_up_after
        self._failed_in_a_row = 0

    async def ask(self, message: str, parse: Callable[[str], T]) -> T:
        """`ChatModel.ask`.

        Raises:
            RequestFailed: no usable answer came.
            GaveUp: nor to the requests before this one, which is not sent.
            ChatModelError: none will come to other messages, either.
        """
        if self._failed_in_a_row >= self.give_up_after:
            raise GaveUp(
                f"the last {self.give_up_after} requests failed, the latest with {self._failure.cause!r} "
                f"({self._failure}); when that is mended, run the same command again to go on"
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
    """Runs all jobs, as many at a time as the model serves; the first that fails ends the others, and is raised.

    Args:
        jobs: made as they are needed.
        model: opened meanwhile; None for jobs that ask nothing.
    """
    if model is None:
        await _take(jobs)
        return
    async with model:
        await _together([_take(jobs) for _ in range(model.width)])


async def _take(jobs: Iterator[Coroutine[Any, Any, None]]) -> None:
    """Takes jobs from the iterator that all workers share, until it is empty."""
    for job in jobs:
        await job
        await asyncio.sleep(0)  # a job that asks nothing would else let no other one, nor Ctrl-C, in between


async def _together(workers: Sequence[Coroutine[Any, Any, None]]) -> None:
    tasks = [asyncio.create_task(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
