# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Connections: half open, silent, unread, or too many."""

import errno
import json
import re
import socket
import time
from contextlib import ExitStack, suppress
from threading import Event

import pytest
from asking import PICTURE, about, half_open, post, running, sent, wait_until

from modeling_deco.serving import Server, ServerOptions


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def drip(connection: socket.socket) -> None:
    """Send single bytes until the other side closes the connection."""
    while is_open(connection):
        with suppress(ConnectionError):
            connection.send(b"a")
        time.sleep(0.02)


def test_a_connection_that_does_not_finish_its_headers_is_closed(start):
    port = start(header_timeout=0.2)
    with half_open(port) as connection:
        began = time.monotonic()
        drip(connection)
    assert time.monotonic() - began >= 0.19
    with half_open(port, b"") as connection:
        assert connection.recv(1) == b""
    with half_open(port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nG") as connection:  # and of its second request
        wait_until(lambda: b"ok" in connection.recv(1000))
        drip(connection)


def test_a_connection_beyond_the_limit_closes_the_longest_waiting_one(start, steps):
    port = start(max_connections=4)
    with ExitStack() as stack:
        answered = stack.enter_context(sent(port, about(PICTURE), stream=True))
        wait_until(lambda: steps)
        waiting = [stack.enter_context(half_open(port)) for _ in range(3)]
        assert post(port, None, "GET", "/health")[0] == 200
        wait_until(lambda: not is_open(waiting[0]))
        waiting += [stack.enter_context(half_open(port)) for _ in range(20)]
        wait_until(lambda: not is_open(waiting[-4]))
        assert [is_open(connection) for connection in waiting[-3:]] == [True] * 3
        assert answered.recv(15) == b"HTTP/1.1 200 OK"


def test_a_connection_whose_body_is_arriving_is_closed_too(start):
    port = start(max_connections=2)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
    with half_open(port, head), half_open(port, head), half_open(port, head):
        assert post(port, None, "GET", "/health")[0] == 200


@pytest.mark.parametrize("num_requests", [1, 2])
def test_a_client_that_does_not_read_is_disconnected(num_requests):
    left = Event()

    async def flood(scope, receive, send):
        connection = scope["state"]["connection"]
        with connection.request():
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b" " * 2**24, "more_body": num_requests == 1})
            if num_requests == 1:  # else it is the second request that waits until there is room
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
        if connection.transport.is_closing():
            left.set()

    with running(flood, ServerOptions(body_timeout=0.2, header_timeout=20)) as port:
        with half_open(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * num_requests):
            assert left.wait(10)


def test_connections_take_half_of_the_open_files_by_default(monkeypatch):
    for files, connections in ((64, 32), (512, 256), (1_000_000, 1000)):
        monkeypatch.setattr("modeling_deco.serving.connections.max_open_files", lambda files=files: files)
        server = Server(None)
        assert server.connections.limit == connections
        # new connections are accepted before they are handled, and before those that they replace are closed
        assert connections + 3 * server.config.backlog < files


def test_connections_that_cannot_be_accepted_are_logged_once(capsys):
    connections = Server(None).connections
    for _ in range(100):
        connections.on_loop_error(None, {"exception": OSError(errno.EMFILE, "Too many open files"), "socket": None})
    assert re.fullmatch(r"WARNING: .*cannot be accepted.*Too many open files\n", capsys.readouterr().err)


def test_bytes_that_are_not_http_are_refused_in_openais_format(port):
    with half_open(port, b"SSH-2.0-OpenSSH\r\n\r\n") as connection:
        answered = connection.makefile().read()
    assert answered.startswith("HTTP/1.1 400 Bad Request\n")
    assert json.loads(answered.partition("\n\n")[2])["error"]["type"] == "invalid_request_error"
