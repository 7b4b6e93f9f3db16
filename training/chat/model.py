"""What a chat model is: a model that answers one message at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

# Causes of `RequestFailed` that both kinds of model know.
UNUSABLE, CUT_OFF, TOO_LONG = "unusable reply", "answer cut off", "message too long"


class RequestFailed(Exception):  # noqa: N818 - never reaches a user: the run counts it and goes on
    """One request has failed for good.

    Attributes:
        cause: a few words, the same for failures of one kind, to count them by.
        of_message: whether it lies in this message, and says nothing about how others will fare.
    """

    def __init__(self, cause: str, message: str, *, of_message: bool = False) -> None:
        super().__init__(message)
        self.cause, self.of_message = cause, of_message

    @classmethod
    def cut_off(cls, limit: int | None) -> RequestFailed:
        """The failure of an answer that has not ended within so many tokens."""
        within = "" if limit is None else f" within {limit} tokens"
        return cls(CUT_OFF, f"the answer did not end{within}; allow longer ones", of_message=True)


class ChatModel(Protocol):
    """A model that answers messages. It is used in an `async with`.

    Attributes:
        name: what records say about where an answer comes from.
        settings: JSON values that decide about its replies, besides the message.
        width: how many calls of `ask` it can serve at the same time.
        retries: how often a request was repeated, by cause.
    """

    name: str
    settings: dict[str, Any]
    width: int
    retries: Counter[str]

    async def ask(self, message: str, parse: Callable[[str], T]) -> T:
        """`parse` of the model's reply to a message; a reply for which it raises ValueError is no answer.

        Raises:
            RequestFailed: no usable answer came.
            ChatModelError: none will come to other messages, either.
        """

    async def __aenter__(self) -> ChatModel: ...

    async def __aexit__(self, *exception: object) -> None: ...
