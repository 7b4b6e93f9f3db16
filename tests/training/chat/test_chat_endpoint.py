"""A real HTTP server that stalls, limits, fails and replies nonsense."""

import asyncio
import datetime
import email.utils
import threading
import time

import pytest

from helpers.chat import PARAGRAPHS, ChatServer, completion
from icae_fast.errors import ChatModelError, InvalidInputError
from icae_fast.training.chat import EndpointModel
from icae_fast.training.chat.endpoint import _retry_after
from icae_fast.training.chat.model import NoRetry, RequestFailed
from icae_fast.training.chat.width import Width
from icae_fast.training.pwc.prompts import answer_request, parse_answer

MESSAGE = answer_request(PARAGRAPHS[0], "Write a title.")


def ask(server, times=1, **options):
    """Send `times` concurrent requests; return the replies and the model."""
    options = {"backoff": 0.01, "timeout": 10.0} | options
    chat_model = EndpointModel(server.url, "model", **options)

    async def run():
        async with chat_model:
            return await asyncio.gather(*(chat_model.ask(MESSAGE, parse_answer) for _ in range(times)))

    return asyncio.run(run()), chat_model


def test_what_is_sent():
    with ChatServer() as server:
        replies, _ = ask(server, api_key="secret", max_answer_tokens=9, body={"seed": 1})
        assert replies == ["An answer about paragraph 1."]
        ask(server, body={"max_tokens": None, "max_completion_tokens": 9})
    (_, path, headers, body), (_, _, second_headers, second) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    messages = [{"role": "user", "content": MESSAGE}]
    assert body == {"model": "model", "max_tokens": 9, "seed": 1, "messages": messages}
    assert PARAGRAPHS[0] in MESSAGE
    assert "Write a title." in MESSAGE
    assert "Authorization" not in second_headers
    assert second == {"model": "model", "max_completion_tokens": 9, "messages": messages}


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("stall", "timeout"),
        ("drop", "no connection"),
        (429, "rate limit"),
        (500, "server error"),
        (503, "server error"),
        (408, "server error"),
        (b"<html>busy</html>", "unusable reply"),
        (b'{"choices": []}', "unusable reply"),
        (b'{"choices": [{"message": {"content": null}}]}', "unusable reply"),
        (b"[]", "unusable reply"),
        (b"\xff\xfe", "unusable reply"),
        (completion(" \n"), "unusable reply"),
    ],
)
def test_a_fault_is_counted_and_the_request_tried_again(fault, cause):
    timeout = 0.2 if fault == "stall" else 10.0
    with ChatServer([fault, fault]) as server:
        replies, chat_model = ask(server, timeout=timeout)
        assert replies == ["An answer about paragraph 1."]
        assert chat_model.retries == {cause: 2}
        server.script += [fault] * 2
        with pytest.raises(RequestFailed) as failed:
            ask(server, timeout=timeout, retries=1)
    assert failed.value.cause == cause
    assert len(server.requests) == 5


def test_a_reply_that_asks_for_no_retry_is_the_only_one():
    def refuse(reply):
        raise NoRetry("no verdict in it")

    async def run(model):
        async with model:
            await model.ask(MESSAGE, refuse)

    with ChatServer() as server, pytest.raises(RequestFailed, match="no verdict in it"):
        asyncio.run(run(EndpointModel(server.url, "model", backoff=100.0)))
    assert len(server.requests) == 1


def test_a_serial_server_is_not_asked_for_more_than_it_can_answer():
    """Each request takes it 0.2 s, so the third of four at once is late, and with its retries all after it."""
    one_at_a_time = threading.Lock()

    def reply(message):
        with one_at_a_time:
            time.sleep(0.2)
        return "An answer."

    with ChatServer(reply=reply) as server:
        replies, model = ask(server, times=16, jobs=4, timeout=0.5, retries=5)
    assert replies == ["An answer."] * 16
    assert model.retries["timeout"] <= 6


def test_requests_at_once_are_halved_by_a_timeout_and_grow_with_replies():
    width = Width(8)
    sent = time.monotonic()
    width.timed_out(sent)
    width.timed_out(sent)  # of the same eight
    assert width.limit == 4
    for limit in (2, 1, 1):
        time.sleep(0.001)
        width.timed_out(time.monotonic() + 0.001)
        assert width.limit == limit
    for _ in range(10_000):
        width.replied()
    assert width.limit == 8


def test_all_requests_wait_as_long_as_the_server_asks():
    with ChatServer([(429, {"Retry-After": "0.3"})]) as server:
        replies, chat_model = ask(server, times=4)
    assert len(replies) == 4
    assert chat_model.retries == {"rate limit": 1}
    times = sorted(time for time, *_ in server.requests)
    assert len(times) == 5
    assert times[-1] - times[0] >= 0.3  # the first retry waited, independent of the other requests


def test_a_wait_beyond_all_reason_is_a_failure():
    with ChatServer([(429, {"Retry-After": "86400"})]) as server, pytest.raises(RequestFailed, match="429"):
        ask(server)
    assert len(server.requests) == 1


def test_retry_after_is_seconds_or_a_date():
    now = datetime.datetime.now(datetime.timezone.utc)
    date = email.utils.format_datetime(now + datetime.timedelta(seconds=100), usegmt=True)
    assert 90 < _retry_after(date) <= 100
    assert _retry_after(email.utils.format_datetime(now - datetime.timedelta(seconds=9))) == 0
    assert _retry_after("2.5") == 2.5
    assert _retry_after("-1") == 0
    assert _retry_after("soon") is _retry_after(None) is None


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses the key"), (403, "refuses access"), (404, "no such address or model")]
)
def test_what_no_retry_can_mend_is_one_error(status, message):
    with ChatServer([status] * 9) as server, pytest.raises(ChatModelError, match=message) as error:
        ask(server)
    assert len(server.requests) == 1
    assert str(status) in str(error.value)


def test_a_refusal_after_a_first_reply_is_of_that_text_alone():
    with ChatServer([None, 403, 400]) as server:
        chat_model = EndpointModel(server.url, "model")

        async def run():
            async with chat_model:
                await chat_model.ask(MESSAGE, parse_answer)
                for _ in range(2):
                    with pytest.raises(RequestFailed) as failed:
                        await chat_model.ask(MESSAGE, parse_answer)
                    assert failed.value.cause == "request refused"
                await chat_model.ask(MESSAGE, parse_answer)

        asyncio.run(run())
    assert len(server.requests) == 4


def test_an_answer_that_was_cut_off_is_none():
    cut = completion("An answer that", finish_reason="length")
    with ChatServer([cut]) as server, pytest.raises(RequestFailed) as failed:
        ask(server)
    assert (failed.value.cause, failed.value.of_message) == ("answer cut off", True)


def test_nobody_there_is_one_error():
    with ChatServer() as server:
        url = server.url
    server.url = url  # closed by now
    with pytest.raises(ChatModelError, match="cannot reach"):
        ask(server)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://[::1", ""])
def test_a_bad_url_is_refused(url):
    with pytest.raises(InvalidInputError, match="URL"):
        EndpointModel(url, "model")


def test_a_bad_key_is_refused_and_not_shown():
    with pytest.raises(InvalidInputError, match="API key") as error:
        EndpointModel("http://localhost/v1", "model", api_key="secret\n")
    assert "secret" not in str(error.value)
