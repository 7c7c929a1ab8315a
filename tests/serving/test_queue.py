# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Clients that disconnect, and more requests than the server accepts."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import openai
import pytest
from asking import PICTURE, about, ask, post, sent, wait_until, wait_until_still

from modeling_deco.serving import chat
from modeling_deco.serving.answer import Answer


@pytest.mark.newest
@pytest.mark.parametrize("streamed", [False, True])
def test_generation_stops_when_its_client_disconnects(port, steps, streamed):
    with sent(port, about(PICTURE), stream=streamed):
        wait_until(lambda: len(steps) > 3)
    wait_until_still(steps)
    assert len(steps) < 500
    assert ask(port, about(PICTURE), max_tokens=1)


def test_a_request_whose_client_disconnects_in_the_queue_does_not_reach_the_model(start, steps, looks, monkeypatch):
    waiting = []

    class Waiting(Answer):
        def __init__(self, *args):
            super().__init__(*args)
            waiting.append(self)

    monkeypatch.setattr(chat, "Answer", Waiting)
    port = start(max_queue=1, prompt_cache_bytes=0)
    with sent(port, about(PICTURE)):
        wait_until(lambda: steps)
        with sent(port, about(PICTURE, PICTURE)):
            wait_until(lambda: len(waiting) == 2)
        wait_until(lambda: waiting[1].is_cancelled)
    assert ask(port, about(PICTURE), max_tokens=1)
    assert len(looks) == len([length for length in steps if length > 1]) == 2


def test_too_many_requests_are_429_until_there_is_room(start, steps):
    port = start(max_queue=1)
    with ThreadPoolExecutor(1) as pool:
        with sent(port, about(PICTURE)):
            wait_until(lambda: steps)
            waiting = pool.submit(ask, port, about(PICTURE), max_tokens=1)
            time.sleep(0.2)  # until it is in the queue
            with pytest.raises(openai.RateLimitError, match="Too many requests are waiting") as refused:
                ask(port, about(PICTURE))
            assert refused.value.response.headers["Retry-After"] == "1"
            assert post(port, None, "GET", "/health")[0] == 200
        assert waiting.result().choices
    assert ask(port, about(PICTURE), max_tokens=1)


@contextmanager
def arriving(port: int, num_bytes: int):
    """A request of one byte more than `num_bytes`; these have been sent."""
    head = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {num_bytes + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}{' ' * num_bytes}".encode())
        time.sleep(0.1)  # until the server has read them
        yield connection


def test_requests_that_arrive_slowly_take_no_place_in_the_queue(start):
    port = start(max_queue=0)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(arriving(port, 1))
        assert ask(port, "Is there a 7?", max_tokens=1)


def test_the_bytes_of_arriving_requests_are_limited(start):
    port = start(max_queue=1, max_body_bytes=1000)
    with arriving(port, 900), arriving(port, 900), arriving(port, 201) as third:
        assert third.makefile().readline() == "HTTP/1.1 429 Too Many Requests\n"
    wait_until(lambda: post(port, b" " * 201)[0] == 400)


def test_the_bytes_of_finished_requests_are_released(start):
    port = start(max_queue=0, max_body_bytes=500)
    bodies = [{"messages": about("data:,x")}, {"messages": about("data:,x"), "model": "another"}, {"messages": []}]
    statuses = [post(port, json.dumps(bodies[number % 3]))[0] for number in range(12)]
    assert statuses == [400, 404, 400] * 4


def test_the_bytes_of_requests_whose_images_are_being_read_count(start, silent_host):
    port = start(max_queue=1, max_body_bytes=1000, allow_private=True)
    with (
        sent(port, about(silent_host.url, question="a" * 700)),
        sent(port, about(silent_host.url, question="b" * 700)),
    ):
        wait_until(lambda: len(silent_host.accepted) == 2)
        assert post(port, b" " * 500)[0] == 429
    wait_until(lambda: post(port, b" " * 500)[0] == 400)


def test_a_request_that_arrives_when_the_queue_is_full_is_429(start, steps):
    port = start(max_queue=0)
    with arriving(port, 1) as late, sent(port, about(PICTURE)):
        wait_until(lambda: steps)
        late.sendall(b" ")
        assert late.makefile().readline() == "HTTP/1.1 429 Too Many Requests\n"
