"""A chat model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from icae_fast.errors import ChatModelError, InvalidInputError
from icae_fast.training.chat.model import UNUSABLE, NoRetry, RequestFailed
from icae_fast.training.chat.replies import shorten
from icae_fast.training.chat.width import Width

try:  # one library under two names: httpx2 since Python 3.11; huggingface_hub depends on one of them
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]  # mypy knows no module of two names

T = TypeVar("T")

_HOPELESS = {401: "refuses the key", 403: "refuses access", 404: "knows no such address or model"}
_LONGEST_BACKOFF = 60.0
_LONGEST_WAIT = 600.0  # seconds; a request that would have to wait longer (e.g. for a daily quota) fails at once


class _Retry(Exception):  # noqa: N818 - control flow within `ask`
    def __init__(self, cause: str, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.cause, self.wait = cause, wait


class EndpointModel:
    """A model behind `POST {url}/chat/completions`, as OpenAI, vLLM, llama.cpp and others serve it.

    Timeouts, lost connections, 408, 409, 429, 5xx and unusable replies are retried after `backoff * 2^n` seconds (at
    most 60, times a random 0.5 to 1), or after the time in `Retry-After`. While a 429 or 503 with `Retry-After` is
    pending, no other request is sent either. An error that no retry can fix (no connection, 401, 403 or 404 before the
    first reply) raises ChatModelError at once. After timeouts fewer requests are sent at once, see `Width`.

    Args:
        url: base URL of the API, e.g. `http://localhost:8000/v1`.
        model: the model's name at the endpoint.
        api_key: sent as a bearer token; None sends none.
        jobs: concurrent requests, `width`.
        timeout: seconds for one request, from sending it to the end of the reply.
        retries: retries of a request.
        max_answer_tokens: sent as `max_tokens`.
        body: further fields of each request; a field that is None is left out, `max_tokens` too.
        backoff: seconds before the first retry.

    Raises:
        InvalidInputError: the URL or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        jobs: int = 4,
        timeout: float = 120.0,
        retries: int = 5,
        max_answer_tokens: int = 1024,
        body: Mapping[str, Any] | None = None,
        backoff: float = 1.0,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.name, self.width = model, jobs
        self.retries: Counter[str] = Counter()
        self._timeout, self._attempts, self._backoff = timeout, retries + 1, backoff
        fields: dict[str, Any] = {"model": model, "max_tokens": max_answer_tokens} | dict(body or {})
        self._body = {name: value for name, value in fields.items() if value is not None}
        self.settings = dict(self._body)
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise InvalidInputError(f"{url!r} is not a URL ({error}); use e.g. http://localhost:8000/v1") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InvalidInputError(f"{url!r} is no http or https URL; use e.g. http://localhost:8000/v1")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InvalidInputError("the API key holds a newline or another character that HTTP forbids; set it again")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._not_before = 0.0
        self._served = False  # after a first reply, address, key and model are known to be right

    async def __aenter__(self) -> EndpointModel:
        self._at_once = Width(self.width)
        self._client = httpx.AsyncClient(headers=self._headers, timeout=None)  # `asyncio.wait_for` limits the total
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.aclose()

    async def ask(self, message: str, parse: Callable[[str], T]) -> T:
        """Return `parse` of the model's reply; see `ChatModel`."""
        body = self._body | {"messages": [{"role": "user", "content": message}]}
        for attempt in range(self._attempts):
            try:
                async with self._at_once:
                    await self._wait()
                    reply = await self._post(body)
                return parse(reply)
            except NoRetry as error:
                raise RequestFailed(UNUSABLE, str(error)) from error
            except (_Retry, ValueError) as error:
                failure = error if isinstance(error, _Retry) else _Retry(UNUSABLE, str(error))
            wait = failure.wait
            if wait is None:
                wait = min(_LONGEST_BACKOFF, self._backoff * 2**attempt) * random.uniform(0.5, 1.0)
            if attempt + 1 == self._attempts or wait > _LONGEST_WAIT:
                break
            self.retries[failure.cause] += 1
            await asyncio.sleep(wait)
        raise RequestFailed(failure.cause, str(failure)) from None

    async def _wait(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def _post(self, body: Mapping[str, Any]) -> str:
        sent = time.monotonic()
        try:
            response = await asyncio.wait_for(self._client.post(self.url, json=body), self._timeout)
        except asyncio.TimeoutError:  # an alias of the builtin TimeoutError only since Python 3.11
            self._at_once.timed_out(sent)
            raise _Retry("timeout", f"no reply within {self._timeout:g} s") from None
        except httpx.ConnectError as error:
            if not self._served:
                raise ChatModelError(
                    f"cannot reach {self.url} ({error}); check the address and that the server is running"
                ) from error
            raise _Retry("no connection", str(error)) from error
        except httpx.TransportError as error:
            raise _Retry("no connection", str(error) or type(error).__name__) from error
        except httpx.RequestError as error:
            raise _Retry(UNUSABLE, str(error)) from error
        self._at_once.replied()
        status = response.status_code
        if status != 200:
            self._refuse(response, status)
        try:
            choice = response.json()["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise _Retry(UNUSABLE, f"not a chat completion: {shorten(response.text)}") from error
        self._served = True
        if not isinstance(content, str):
            raise _Retry(UNUSABLE, f"the reply's content is {shorten(repr(content))}, not text")
        if choice.get("finish_reason") == "length":
            raise RequestFailed.cut_off(self._body.get("max_tokens"))
        return content

    def _refuse(self, response: httpx.Response, status: int) -> None:
        said = f"{status}: {shorten(response.text, 200)}"
        if status == 401 or (status in _HOPELESS and not self._served):
            raise ChatModelError(
                f"{self.url} {_HOPELESS[status]} ({said}); check the address, the model name {self.name} and the API "
                "key"
            )
        if status in (408, 409, 429) or status >= 500:
            wait = _retry_after(response.headers.get("retry-after"))
            if wait is not None and status in (429, 503) and wait <= _LONGEST_WAIT:
                self._not_before = max(self._not_before, time.monotonic() + wait)
            raise _Retry("rate limit" if status == 429 else "server error", said, wait)
        raise RequestFailed("request refused", said)


def _retry_after(header: str | None) -> float | None:
    """Return the seconds to wait by a Retry-After header, which holds a number or a date; None if it is unreadable."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (date - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
