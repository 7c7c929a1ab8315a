# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Ask a server: by OpenAI's own client over real sockets, and by requests that no client sends."""

import base64
import http.client
import io
import json
import socket
import time
from contextlib import contextmanager
from threading import Thread

import openai
from PIL import Image

from modeling_deco.serving import Server, ServerOptions
from modeling_deco.worlds.digits.scenes import render

NAME = "deco-digits"


@contextmanager
def running(application, options=ServerOptions()):  # noqa: B008  frozen
    """Run an application in a thread, and return its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(application, options)
        server.config.timeout_graceful_shutdown = 1
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def client(port: int, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", **{"api_key": "-", "max_retries": 0, **options})


def ask(port: int, messages: list[dict] | str, timeout: float = 60, **fields):
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    with client(port) as asking:
        result = asking.chat.completions.create(model=NAME, messages=messages, timeout=timeout, **fields)
        return list(result) if fields.get("stream") else result


def answer(port: int, messages, **fields) -> str:
    return ask(port, messages, **fields).choices[0].message.content


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def about(*urls: str, question: str = "How many digits are there?") -> list[dict]:
    """The messages of a question about images."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def post(port: int, body, method="POST", path="/v1/chat/completions", **headers):
    """Status, headers and JSON of an answer, without OpenAI's client."""
    headers = {
        "Content-Type": "application/json",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, json.loads(content)


def sent(port: int, messages: list[dict], **fields) -> socket.socket:
    """The connection over which a request was sent, and nothing is read."""
    body = json.dumps({"messages": messages, **fields})
    head = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}{body}".encode())
    return connection


def half_open(port: int, beginning: bytes = b"GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: ") -> socket.socket:
    """A connection over which only the beginning of a request was sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(beginning)
    return connection


def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_still(steps: list[int]) -> None:
    """Wait until the list does not grow for the time of five steps."""
    number = None
    while number != len(steps):
        number = len(steps)
        time.sleep(0.1)


SCENE = render("test", index=10, seed=2026, min_digits=4)
PICTURE = data_url(SCENE.image)
DIGIT = SCENE.digits[0]
COLOUR_QUESTION = f"What colour is the {DIGIT.value}?"
COLOUR_ANSWER = f"{DIGIT.value} {DIGIT.colour}."
