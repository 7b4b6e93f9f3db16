"""How many requests are sent to an endpoint at once."""

from __future__ import annotations

import asyncio
import time

_REPLIES = 16  # replies in a row, by request at once, after which one more is tried


class Width:
    """A limit of requests at once, halved when they time out; an `async with` block is one request.

    A server that works on one request after the other answers the last of many too late. It still works on requests
    that were given up, and would fall behind further with each one that is sent again.

    Args:
        most: requests at once as long as none times out.

    Attributes:
        limit: requests at once now.
    """

    def __init__(self, most: int) -> None:
        self.most = self.limit = most
        self._out = self._replies = 0
        self._halved = -1.0
        self._left = asyncio.Condition()

    async def __aenter__(self) -> Width:
        async with self._left:
            await self._left.wait_for(lambda: self._out < self.limit)
            self._out += 1
        return self

    async def __aexit__(self, *exception: object) -> None:
        async with self._left:
            self._out -= 1
            self._left.notify_all()

    def timed_out(self, sent: float) -> None:
        """Halve the limit, once for all requests that were out together.

        Args:
            sent: `time.monotonic()` when the request was sent.
        """
        self._replies = 0
        if sent > self._halved:
            self.limit = max(1, self.limit // 2)
            self._halved = time.monotonic()

    def replied(self) -> None:
        """Count a reply; many in a row raise the limit by one."""
        self._replies += 1
        if self.limit < self.most and self._replies >= _REPLIES * self.limit:
            self.limit += 1
            self._replies = 0
