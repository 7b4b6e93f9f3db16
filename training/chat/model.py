"""The interface of chat models, which answer one message at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

# Causes of `RequestFailed` that both endpoint and local models use.
UNUSABLE, CUT_OFF, TOO_LONG = "unusable reply", "answer cut off", "message too long"


class RequestFailed(Exception):  # noqa: N818 - never reaches a user: the run counts it and continues
    """A request that failed after all retries.

    Attributes:
        cause: kind of the failure in a few words, to count failures by.
        of_message: whether the message itself is the reason, so that other messages may succeed.
    """

    def __init__(self, cause: str, message: str, *, of_message: bool = False) -> None:
        super().__init__(message)
        self.cause, self.of_message = cause, of_message

    @classmethod
    def cut_off(cls, limit: int | None) -> RequestFailed:
        """Return the failure of an answer that did not end within `limit` tokens."""
        within = "" if limit is None else f" within {limit} tokens"
        return cls(CUT_OFF, f"the answer did not end{within}; allow longer ones", of_message=True)


class NoRetry(ValueError):  # noqa: N818 - a reply is no error
    """An unusable reply that the same message is likely to bring again, so that another message is better."""


class ChatModel(Protocol):
    """A model that answers messages, used in an `async with`.

    Attributes:
        name: name of the model in records.
        settings: JSON values that determine its replies, besides the message.
        width: number of concurrent calls of `ask`.
        retries: number of retried requests, by cause.
    """

    name: str
    settings: dict[str, Any]
    width: int
    retries: Counter[str]

    async def ask(self, message: str, parse: Callable[[str], T]) -> T:
        """Return `parse` of the model's reply to a message.

        Args:
            message: the message to answer.
            parse: reads the reply; raises ValueError if it is unusable and may be tried again, or `NoRetry`.

        Raises:
            RequestFailed: there is no usable answer.
            ChatModelError: the model cannot answer any message.
        """

    async def __aenter__(self) -> ChatModel: ...

    async def __aexit__(self, *exception: object) -> None: ...
