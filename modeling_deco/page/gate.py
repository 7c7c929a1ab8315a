# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Limits on the page's requests: their paths, origin, size and time, and the space of uploads."""

import asyncio
import re
from contextlib import nullcontext, suppress
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from ..inference.limits import UNTRUSTED_LIMITS

# The requests of the browser. gradio's server has many more, for other kinds of pages and for programs.
_ROUTES = {
    "GET": re.compile(
        r"/|/(assets|static|svelte)/.*|/config/?|/theme\.css|/(favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?)"
        r"|/gradio_api/(file=.*|heartbeat/\w+|queue/data|upload_progress|startup-events|login_check/?|user/?|info/?)"
    ),
    "POST": re.compile(r"/login/?|/gradio_api/(upload|queue/join|run/predict|cancel|reset)/?"),
}
_MAX_BODY = 2**20  # bytes of a request that is not an upload
_MAX_UPLOADS = 2**30  # bytes of all uploads that are kept
_BODY_TIMEOUT = 60.0  # seconds


class Gate:
    """ASGI middleware that admits only the page's own requests, limits their size and time, and deletes the oldest
    uploads before they fill the disk."""

    def __init__(self, app, uploads: Path):
        self.app = app
        self.uploads = uploads
        self.examples = set(uploads.rglob("*"))
        self.num_bytes_arriving = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            status, message = refusal
            await PlainTextResponse(message, status)(scope, receive, send)
            return
        num_bytes = int(Headers(scope=scope).get("content-length", 0))
        if scope["path"].startswith("/gradio_api/upload"):
            await asyncio.to_thread(self._make_room, num_bytes)
        self.num_bytes_arriving += num_bytes
        connection = scope["state"].get("connection")  # None under another server
        try:
            with nullcontext() if connection is None else connection.request():
                await self.app(scope, _in_time(receive), send)
        except ClientDisconnect:  # in the middle of its request
            pass
        finally:
            self.num_bytes_arriving -= num_bytes

    def _refusal(self, scope) -> tuple[int, str] | None:
        """The status and message of a request that is refused."""
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in _ROUTES or not _ROUTES[method].fullmatch(scope["path"]):
            return 404, "There is nothing at this address."
        if method == "GET":
            return None
        headers = Headers(scope=scope)
        origin = headers.get("origin")  # browsers send it, and web pages cannot change it
        if origin is not None and urlsplit(origin).netloc not in (
            headers.get("host"),
            headers.get("x-forwarded-host"),
        ):
            return 403, "Requests from other sites are refused."
        if not re.fullmatch(r"[0-9]{1,15}", headers.get("content-length", "")):
            return 411, "The request has no Content-Length header."
        is_upload = scope["path"].startswith("/gradio_api/upload")
        # an upload has headers and boundaries in addition to its file
        max_bytes = UNTRUSTED_LIMITS.max_bytes + 2**16 if is_upload else _MAX_BODY
        num_bytes = int(headers["content-length"])
        if num_bytes > max_bytes:
            return 413, f"The request has {num_bytes:,} bytes, more than the maximum of {max_bytes:,}."
        if self.num_bytes_arriving + num_bytes > _MAX_UPLOADS:
            return 503, "Too many uploads are arriving; try again."
        return None

    def _make_room(self, num_bytes: int) -> None:
        """Delete the oldest uploads if there would be too many."""
        files = []
        for path in self.uploads.rglob("*"):
            with suppress(OSError):  # it may have been deleted
                if path not in self.examples and path.is_file():
                    stat = path.stat()
                    files.append((stat.st_mtime, max(stat.st_size, 2**16), path))  # a file takes more than its bytes
        room = _MAX_UPLOADS - sum(size for _, size, _ in files) - num_bytes
        for _, size, path in sorted(files):
            if room >= 0:
                break
            path.unlink(missing_ok=True)
            room += size


def _in_time(receive):
    """`receive` that disconnects a client whose request has not arrived in time."""
    deadline = asyncio.get_running_loop().time() + _BODY_TIMEOUT
    has_arrived = False

    async def receive_in_time():
        nonlocal has_arrived
        if has_arrived:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            return {"type": "http.disconnect"}
        has_arrived = not message.get("more_body", False)
        return message

    return receive_in_time
