# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Read untrusted images, videos and URLs, for the server and the page."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any, TypeVar

from PIL import Image

from ..utils.decoding import ImageError
from .decoders import Decoder, VideoDecoder
from .images import fetch, named
from .limits import UNTRUSTED_LIMITS, UNTRUSTED_VIDEO_LIMITS, ImageLimits, Stop

Frame = tuple[float, Image.Image]
T = TypeVar("T")


class PictureReader:
    """Reads untrusted images and URLs within limits on time, memory and number.

    `num_decoders` processes decode the images. They start when they are first needed. A process that crashes, takes
    too long or exceeds its memory is killed and replaced. The memory is limited on Linux only; elsewhere the limits on
    time and pixels apply. Downloads run in separate threads. If a task is cancelled, its connections are closed and
    its decoder is killed.

    Args:
        limits: limits for one image, and for all images of a request together. `timeout` applies to each download.
        allow_files: whether strings may be paths of local files.
        allow_private: whether URLs and redirects may lead to addresses that are not public: this machine, its network,
            the metadata service of a cloud. If not, proxies are not used either, because they would connect.
        num_decoders: number of processes, and of requests whose decoded images are in memory at the same time.
        max_downloads: number of downloads at the same time, one for each request. Use the number of concurrent
            requests, so that no request waits for the slow host of another.
    """

    kind = "image"
    _decoder_class: type = Decoder

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
        self._of_thread = threading.local()  # each thread of `_decoders` has its own process
        self._stops: set[Stop] = set()

    @asynccontextmanager
    async def read_all(self, sources: Sequence[str | bytes]) -> AsyncIterator[list[Image.Image]]:
        """Read the images of a request and keep them in memory while the block runs.

        At most `num_decoders` blocks run at the same time.

        Args:
            sources: `http:`, `https:` or `data:` URLs, encoded images as bytes, or paths if files are allowed.

        Returns:
            Images as from `read_image`, in the order of the sources.

        Raises:
            ImageError: an image cannot be read (the message names it), or all images together are too large.
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
        """Read one image. Returns and raises what `read_image` does."""
        encoded = await self._in_thread(self._fetchers, self._fetch, source)
        return await self._in_thread(self._decoders, self._decode_one, source, encoded)

    def read_sync(self, source: str | bytes) -> Image.Image:
        """`read` for synchronous code, with the same processes."""
        encoded = self._fetch(source, Stop())
        return self._decoders.submit(self._decode_one, source, encoded, Stop()).result()

    def close(self) -> None:
        """Stop all downloads and end the processes."""
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
            stop()  # if this task was cancelled; otherwise nothing is left to end
            self._stops.discard(stop)

    def _fetch(self, source, stop: Stop) -> bytes:
        with named(source, self.kind):
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

    def _decoder(self) -> Any:
        if not hasattr(self._of_thread, "decoder"):
            self._of_thread.decoder = self._decoder_class(self.limits)
        return self._of_thread.decoder


class VideoReader(PictureReader):
    """Reads untrusted videos and URLs, like a `PictureReader`. It has processes of its own, so that no image waits for
    a video.

    Args:
        limits: limits for one video. `max_pixels` applies to a frame, the times to all frames.
    """

    kind = "video"
    _decoder_class = VideoDecoder

    def __init__(self, limits: ImageLimits = UNTRUSTED_VIDEO_LIMITS, **options):
        super().__init__(limits, **options)

    async def read_frames(
        self, source: str | bytes, fps: float, max_frames: int, convert: Callable[[Iterator[Frame]], T]
    ) -> T:
        """Read the frames of a video.

        Args:
            source: as in `read_all`.
            fps, max_frames: as in `videos.read_video`.
            convert: what to make of the frames, each seconds and picture, in another thread while they are decoded, so
                that they need not be in memory together.

        Raises:
            ImageError: the video cannot be read.
        """
        encoded = [await self._in_thread(self._fetchers, self._fetch, source)]
        return await self._in_thread(self._decoders, self._convert, source, encoded, fps, max_frames, convert)

    def read_frames_sync(self, source: str | bytes, fps: float, max_frames: int, convert: Callable) -> Any:
        """`read_frames` for synchronous code, with the same processes."""
        encoded = [self._fetch(source, Stop())]
        return self._decoders.submit(self._convert, source, encoded, fps, max_frames, convert, Stop()).result()

    def _convert(self, source, encoded: list[bytes], fps, max_frames, convert, stop: Stop):
        def frames():
            with stop.after(self.limits.decode_timeout), named(source, self.kind):
                yield from self._decoder().frames(encoded.pop(), fps, max_frames, stop)

        with closing(frames()) as decoded:
            return convert(decoded)


@contextmanager
def _at(position: int) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"Image {position}: {error}") from error.__cause__
