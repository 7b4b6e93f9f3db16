"""Chat models for tests: a teacher in this process, and a chat completions server that misbehaves on request."""

import asyncio
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from icae_fast.training.chat.model import RequestFailed

# About 24 words a paragraph, so that a limit of 30 makes each a passage.
PARAGRAPHS = [
    f"Paragraph {n} says that the keeper of light {n} was called Marta. She climbed the stairs at dusk, lit the lamp, "
    f"and wrote {n} into the log."
    for n in range(1, 6)
]


def reply_to(message, questions=3):
    """Return a reply in the format that the message requests, with the number of the message's paragraph in it."""
    number = re.search(r"Paragraph (\d+)", message)[1]
    if "JSON list" in message:
        pairs = [{"prompt": f"Question {number}.{i}?", "answer": f"Answer {i}."} for i in range(questions)]
        return f"Certainly!\n```json\n{json.dumps(pairs)}\n```"
    if "numbered list" in message:
        return "Here they are:\n" + "\n".join(f"{i + 1}. Question {number}.{i}?" for i in range(questions))
    return f"An answer about paragraph {number}."


class ScriptedTeacher:
    """A chat model that replies with `reply_to`, unless its script has a reply or an error for this request."""

    name, settings, width = "scripted", {}, 2

    def __init__(self, script=(), questions=3):
        self.script, self.questions = list(script), questions
        self.messages, self.retries = [], Counter()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        pass

    async def ask(self, message, parse):
        self.messages.append(message)
        reply = (self.script.pop(0) if self.script else None) or reply_to(message, self.questions)
        await asyncio.sleep(0)
        if isinstance(reply, Exception):
            raise reply
        try:
            return parse(reply)
        except ValueError as error:
            raise RequestFailed("unusable reply", str(error)) from error


class ChatServer(ThreadingHTTPServer):
    """A server of chat completions on a free port.

    Args:
        script: faults of the next requests: a status, `(status, headers)`, a body as bytes, "stall", "drop" (the
            connection), or None for a normal reply.
        delay: seconds before each reply.
        reply: makes a reply of the request's message.

    Attributes:
        requests: (time, path, headers, body) of each request so far.
    """

    daemon_threads = True

    def __init__(self, script=(), delay=0.0, reply=reply_to):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.delay, self.reply, self.requests = list(script), delay, reply, []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.released.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((time.monotonic(), self.path, dict(self.headers), body))
        fault = self.server.script.pop(0) if self.server.script else None
        if fault == "stall":
            self.server.released.wait(30)
        if fault in ("stall", "drop"):
            self.close_connection = True
            return
        time.sleep(self.server.delay)
        status, headers = fault if isinstance(fault, tuple) else (fault if isinstance(fault, int) else 200, {})
        if isinstance(fault, bytes):
            data = fault
        elif status != 200:
            data = b'{"error": {"message": "no"}}'
        else:
            data = completion(self.server.reply(body["messages"][0]["content"]))
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def completion(content, finish_reason="stop"):
    """Return the body of a chat completion as bytes."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
