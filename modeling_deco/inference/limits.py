# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Limits on the size of images and on the time to read them, and the means to stop a wait."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageLimits:
    """Limits on the size of an image and on the time to read it.

    Attributes:
        max_bytes: size of a download, data URL, upload or pipe. Local files that the user names may be larger.
        max_pixels: width times height. Default: the size that Pillow calls a decompression bomb.
        timeout: seconds for a download, including name resolution and redirects.
        connect_timeout: seconds for a connection to one address, before the next address is tried.
        decode_timeout: seconds to decode an untrusted image, or all images of a request together.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 178_956_970
    timeout: float = 15.0
    connect_timeout: float = 5.0
    decode_timeout: float = 10.0

    @property
    def decode_memory(self) -> int:
        """Bytes of address space for a decoder. Transparent and floating point images need the most for each pixel."""
        return 256 * 2**20 + 3 * self.max_bytes + 32 * self.max_pixels


# For images that anybody may send to a server: photographs of up to 50 megapixels.
UNTRUSTED_LIMITS = ImageLimits(max_pixels=50_000_000)

# For videos, whose `max_pixels` are those of a frame: 8K. The times are for all of a video's frames.
UNTRUSTED_VIDEO_LIMITS = ImageLimits(max_bytes=128 * 2**20, max_pixels=2**25, timeout=60.0, decode_timeout=60.0)


class Stop:
    """Ends what a thread waits for, from another thread: at a time limit, or when the result is no longer needed."""

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
        """Call `action` to end the block when this is stopped."""
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
        """Stop the block when it has run for so many seconds."""
        timer = threading.Timer(seconds, self)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
