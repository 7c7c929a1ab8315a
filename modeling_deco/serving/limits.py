# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Limits on requests: who may send them, their size, the time that they take to arrive, and how many may wait."""

import asyncio
import hmac
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import anyio
from starlette.requests import ClientDisconnect, Request

from .errors import RequestError, quoted, respond_to_http_error
from .options import ServerOptions


class Capacity:
    """Counts the requests that the server has accepted, over all connections.

    Attributes:
        taken: number of requests at each place: `"answers"` are those that wait for the model or are being answered,
            `"images"` those whose images are being read. The latter keep no other request from the model. `"videos"`
            are those with videos, read or not, whose pixels are in memory.
        num_bytes: size of the requests that are arriving or whose images are being read. A request that arrives slowly
            takes no place.
    """

    def __init__(self, options: ServerOptions):
        self.options = options
        self.taken: Counter[str] = Counter()
        self.num_bytes = 0

    def check(self, place: str = "answers") -> None:
        """Raise a `RequestError` if a place or the memory is full."""
        max_bytes = (self.options.max_queue + 1) * self.options.max_body_bytes
        limit = self.options.max_video_requests - 1 if place == "videos" else self.options.max_queue
        if self.taken[place] > limit or self.num_bytes > max_bytes:
            message = "Too many requests are waiting; try again in a second."
            raise RequestError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})

    @contextmanager
    def place(self, name: str) -> Iterator[None]:
        """Take a place while the block runs."""
        self.check(name)
        self.taken[name] += 1
        try:
            yield
        finally:
            self.taken[name] -= 1

    @contextmanager
    def memory(self, num_bytes: int) -> Iterator[None]:
        """Take memory while the block runs."""
        self.num_bytes += num_bytes
        try:
            yield
        finally:
            self.num_bytes -= num_bytes


class LimitMiddleware:
    """ASGI middleware that checks the host and the API key, reads the body, and cancels a request when its client
    disconnects."""

    def __init__(self, app, options: ServerOptions, capacity: Capacity, hosts: list[str] | None):
        self.app = app
        self.options = options
        self.capacity = capacity
        self.hosts = hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        connection = scope.get("state", {}).get("connection")  # None under another server
        with nullcontext() if connection is None else connection.request():
            try:
                self._check_host(request)
                self._check_key(request)
                if request.method != "POST":
                    await self.app(scope, receive, send)
                    return
                body = [await self._read(request)]  # a list, so that nothing here keeps a reference to the body
                if connection is not None:
                    connection.end_waiting()
                await self._answer(body.pop(), scope, receive, send)
            except RequestError as error:
                await (await respond_to_http_error(request, error))(scope, receive, send)
            except (ClientDisconnect, asyncio.CancelledError):  # the client disconnected, or the server shuts down
                return

    def _check_host(self, request: Request) -> None:
        given = request.headers.get("host", "")
        try:
            host = urllib.parse.urlsplit(f"//{given}").hostname
        except ValueError:
            host = None
        if self.hosts is not None and host not in self.hosts:
            message = f"The Host header is {quoted(given)}; it must be one of {', '.join(self.hosts)}."
            raise RequestError(400, message, code="wrong_host")

    def _check_key(self, request: Request) -> None:
        key = self.options.api_key
        if key is None or request.scope["path"] == "/health":
            return
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
        if not hmac.compare_digest(f"Bearer {key}".encode(), given):
            message = "The API key is missing or wrong; send it in the header Authorization: Bearer KEY."
            raise RequestError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request) -> bytes:
        limit = self.options.max_body_bytes
        too_large = RequestError(413, f"The request has more than {limit:,} bytes; send fewer or smaller images.")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            try:
                async for piece in request.stream():
                    body += piece
                    self.capacity.num_bytes += len(piece)
                    if len(body) > limit:
                        raise too_large
                    self.capacity.check()
                return bytes(body)
            finally:
                self.capacity.num_bytes -= len(body)

        try:
            return await asyncio.wait_for(read(), self.options.body_timeout)
        except asyncio.TimeoutError:
            message = f"The request took more than {self.options.body_timeout:g} s to arrive."
            raise RequestError(408, message, headers={"Connection": "close"}) from None

    async def _answer(self, body: bytes, scope, receive, send) -> None:
        """Run the application on a body that has been read, and cancel it when the client disconnects."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        del body  # megabytes, which the endpoint releases before it waits

        async def replay():
            if not messages:
                await asyncio.Event().wait()  # until cancelled
            return messages.pop()

        with anyio.CancelScope() as answering:

            async def watch():
                while (await receive())["type"] != "http.disconnect":
                    pass
                answering.cancel()

            watching = asyncio.create_task(watch())
            try:
                await self.app(scope, replay, send)
            finally:
                watching.cancel()
