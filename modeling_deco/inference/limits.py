# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How large a picture may be and how long it may take, and what ends a wait at that time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageLimits:
    """How large a picture may be, and how long it may take.

    Attributes:
        max_bytes: of a download, a data URL, an upload, a pipe; a file of one's own may be larger.
        max_pixels: width times height. Default: where Pillow sees a bomb.
        timeout: seconds that a download may take, the look-up of the name and redirects included.
        connect_timeout: seconds that an address may take to accept a connection, before the next one is tried.
        decode_timeout: seconds that a picture of others, or those of a request together, may take to be decoded.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 178_956_970
    timeout: float = 15.0
    connect_timeout: float = 5.0
    decode_timeout: float = 10.0

    @property
    def decode_memory(self) -> int:
        """Bytes of address space for a decoder; transparent and floating point pictures take the most for a pixel."""
        return 256 * 2**20 + 3 * self.max_bytes + 32 * self.max_pixels


# For what anybody may send to a server: a photograph of 50 megapixels.
UNTRUSTED_LIMITS = ImageLimits(max_pixels=50_000_000)


class Stop:
    """Ends what a thread waits for, from outside: at a time limit, or when nobody waits for the thread any more."""

    def __init__(self):
        self.is_set = False
        self._actions: list[Callable] = []
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.is_set = True
            for action in self._actions:
                with suppress(OSError):
                    action()

    @contextmanager
    def ending_by(self, action: Callable) -> Iterator[None]:
        """While the block runs, `action` is what ends it."""
        with self._lock:
            self._actions.append(action)
        try:
            if self.is_set:
                self()
            yield
        finally:
            with self._lock:
                self._actions.remove(action)

    @contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        """Stop what the block does when it has run for so long."""
        timer = threading.Timer(seconds, self)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
