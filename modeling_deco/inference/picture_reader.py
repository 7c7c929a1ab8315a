# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads the pictures that others send or name: to the server, to the page."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

from PIL import Image

from ..utils.decoding import ImageError
from .decoders import Decoder
from .images import fetch, named
from .limits import UNTRUSTED_LIMITS, ImageLimits, Stop


class PictureReader:
    """Reads untrusted pictures and URLs, within limits of time, memory and number.

    Pictures are decoded by `num_decoders` processes, which are started when first needed. One that a picture crashes,
    or keeps for longer or makes larger than the limits say, is killed and replaced. (The memory of a process is
    limited on Linux; elsewhere the limits of time and pixels must do.) Downloads run in threads of their own. What a
    cancelled task has begun ends at once: connections are closed, a decoder is killed.

    Args:
        limits: of a picture, and of those of a request together; only the time of a download is one picture's.
        allow_files: whether strings may name files of this machine.
        allow_private: whether URLs may lead, at once or by redirects, to addresses that are not public: this machine,
            its network, a cloud's metadata service. Where not, proxies are not used either, since they would connect.
        num_decoders: processes, and requests whose decoded pictures are in memory at the same time.
        max_downloads: at the same time; a request has one. As many as there may be requests, so that none waits for
            the slow host of another.
    """

    def __init__(
        self,
        limits: ImageLimits = UNTRUSTED_LIMITS,
        *,
        allow_files: bool = False,
        allow_private: bool = False,
        num_decoders: int = 2,
        max_downloads: int = 64,
    ):
        self.limits = limits
        self.allow_files = allow_files
        self.allow_private = allow_private
        self._places = asyncio.Semaphore(num_decoders)
        self._fetchers = ThreadPoolExecutor(max_downloads, thread_name_prefix="fetch-picture")
        self._decoders = ThreadPoolExecutor(num_decoders, thread_name_prefix="decode-picture")
        self._of_thread = threading.local()  # each thread of `_decoders` has a process
        self._stops: set[Stop] = set()

    @asynccontextmanager
    async def read_all(self, sources: Sequence[str | bytes]) -> AsyncIterator[list[Image.Image]]:
        """The pictures of a request, in memory while the block runs: `num_decoders` blocks run at the same time.

        Args:
            sources: `http:`, `https:` or `data:` URLs, encoded pictures as bytes, names of files where they are
                allowed.

        Returns:
            Images as `read_image` returns them, in the order of the sources.

        Raises:
            ImageError: one of them cannot be read, and which, or all together are too large.
        """
        encoded, num_bytes = [], 0
        for position, source in enumerate(sources, 1):
            with _at(position):
                encoded.append(await self._in_thread(self._fetchers, self._fetch, source))
            num_bytes += len(encoded[-1])
            if num_bytes > self.limits.max_bytes:
                mib = self.limits.max_bytes / 2**20
                raise ImageError(f"Images 1 to {position} have more than {mib:.4g} MiB together.")
        async with self._places:
            yield await self._in_thread(self._decoders, self._decode, sources, encoded)

    async def read(self, source: str | bytes) -> Image.Image:
        """One picture, as `read_image` returns it.

        Raises:
            ImageError: it cannot be read.
        """
        encoded = await self._in_thread(self._fetchers, self._fetch, source)
        return await self._in_thread(self._decoders, self._decode_one, source, encoded)

    def read_sync(self, source: str | bytes) -> Image.Image:
        """`read` for code that is not asynchronous; it waits for the same processes."""
        encoded = self._fetch(source, Stop())
        return self._decoders.submit(self._decode_one, source, encoded, Stop()).result()

    def close(self) -> None:
        """End what is under way, and the processes."""
        for stop in list(self._stops):
            stop()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, executor: ThreadPoolExecutor, function: Callable, *args):
        stop = Stop()
        self._stops.add(stop)
        try:
            return await asyncio.wrap_future(executor.submit(function, *args, stop))
        finally:
            stop()  # where this task was cancelled; else there is nothing left to end
            self._stops.discard(stop)

    def _fetch(self, source, stop: Stop) -> bytes:
        with named(source):
            return fetch(source, self.limits, self.allow_files, self.allow_private, stop)

    def _decode(self, sources, encoded: list[bytes], stop: Stop) -> list[Image.Image]:
        images, num_pixels = [], 0
        with stop.after(self.limits.decode_timeout):
            for position, source in enumerate(sources, 1):
                with _at(position), named(source):
                    images.append(self._decoder().decode(encoded.pop(0), stop))
                num_pixels += images[-1].width * images[-1].height
                if num_pixels > self.limits.max_pixels:
                    raise ImageError(
                        f"Images 1 to {position} have {num_pixels:,} pixels together, more than the "
                        f"{self.limits.max_pixels:,} allowed in a request."
                    )
        return images

    def _decode_one(self, source, encoded: bytes, stop: Stop) -> Image.Image:
        with stop.after(self.limits.decode_timeout), named(source):
            return self._decoder().decode(encoded, stop)

    def _decoder(self) -> Decoder:
        if not hasattr(self._of_thread, "decoder"):
            self._of_thread.decoder = Decoder(self.limits)
        return self._of_thread.decoder


@contextmanager
def _at(position: int) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"Image {position}: {error}") from error.__cause__
