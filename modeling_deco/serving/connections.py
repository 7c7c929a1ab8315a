# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Limits on connections: how many are open, and how long each may keep the server waiting."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from uvicorn.protocols.http.h11_impl import H11Protocol  # private, seen in uvicorn 0.31 to 0.54

from ..utils.errors import one_line
from .errors import error_body
from .options import ServerOptions
from .sockets import max_open_files

logger = logging.getLogger("uvicorn.error")


class Connections:
    """The open connections of a server.

    A connection may keep the server waiting for a while: until it has sent the headers or the body of a request, or
    has read what was sent to it. Those that do are in `waiting`, the longest first. They are closed when new
    connections need their place.
    """

    def __init__(self, options: ServerOptions):
        self.options = options
        self.limit = options.max_connections or min(1000, max_open_files() // 2)
        # asyncio accepts this many before it handles any of them
        self.num_accepted_at_once = max(1, min(16, self.limit // 8))
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}
        self.last_warning = -60.0

    def add(self, connection: "Connection") -> None:
        """Register a new connection, and close another one if there are too many."""
        self.open.add(connection)
        self.waiting[connection] = None
        if len(self.open) > self.limit:
            self.close_longest_waiting()

    def close_longest_waiting(self) -> None:
        """Close the connection that has kept the server waiting for the longest time, if there is one."""
        longest = next(iter(self.waiting), None)
        if longest is not None:
            del self.waiting[longest]
            longest.transport.abort()

    def discard(self, connection: "Connection") -> None:
        """Forget a connection that has been closed."""
        self.open.discard(connection)
        self.waiting.pop(connection, None)

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        """asyncio's exception handler. When the process can open no more files, asyncio reports dozens of errors."""
        error = context.get("exception")
        if not isinstance(error, OSError) or "socket" not in context:
            loop.default_exception_handler(context)
            return
        self.close_longest_waiting()
        if time.monotonic() - self.last_warning >= 60:
            self.last_warning = time.monotonic()
            logger.warning("Connections cannot be accepted for a while: %s", one_line(error))


class Connection(H11Protocol):
    """A connection that is closed when it keeps the server waiting for too long."""

    def __init__(self, connections: Connections, *args, app_state: dict, **kwargs):
        # `app_state` becomes the `state` of each request
        super().__init__(*args, app_state={**app_state, "connection": self}, **kwargs)
        self.all = connections
        self.num_requests = 0
        self.is_unread = False  # the client has not read what was sent, and the system's buffer is full
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.all.add(self)
        self._set_timer()

    def connection_lost(self, exc) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.all.discard(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.is_unread = True
        self._set_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.is_unread = False
        self._set_timer()

    def _set_timer(self) -> None:
        """Start the timer of what the server waits for now, if it waits."""
        if self.timer is not None:
            self.timer.cancel()
        options, loop = self.all.options, asyncio.get_running_loop()
        if self.is_unread:
            self.timer = loop.call_later(options.body_timeout, self.transport.abort)
        elif self.num_requests == 0:
            self.timer = loop.call_later(options.header_timeout, self.transport.abort)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Run the block while the server handles a request. Afterwards the client must read the answer, or send
        another request."""
        self.num_requests += 1  # two for a moment, if a request follows another one immediately
        self._set_timer()
        try:
            yield
        finally:
            self.num_requests -= 1
            if self.num_requests == 0 and self in self.all.open:
                self._set_timer()
                self.end_waiting()
                self.all.waiting[self] = None  # at the end of the order

    def end_waiting(self) -> None:
        """The request has arrived: now the client waits for the server."""
        self.all.waiting.pop(self, None)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has headers of more than 64 KiB."""
        if self.num_requests == 0:
            body = json.dumps(
                error_body(400, "This is not an HTTP/1.1 request, or its headers are too long.")
            ).encode()
            head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
