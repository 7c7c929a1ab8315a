# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Decode untrusted images and videos in separate processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from ..utils.decoding import LENGTH, READY, ImageError
from .limits import ImageLimits, Stop

# In isolated mode nothing is imported from the working directory before the path of the parent is set.
_DECODE = """
import json, sys
sys.path[:], *limits = json.loads(sys.argv[1])
from modeling_deco.utils.{module} import {function}
{function}(*limits)
"""


class Decoder:
    """A process that decodes one image at a time, for one thread."""

    program = _DECODE.format(module="decoding", function="serve_pictures")

    def __init__(self, limits: ImageLimits):
        self.limits = limits
        self.process: Any = None  # a `subprocess.Popen` while it runs

    def __del__(self):
        self._end()

    def decode(self, encoded: bytes, stop: Stop) -> Image.Image:
        """Decode an image.

        Raises:
            ImageError: the image cannot be decoded within the limits.
        """
        with self._running(stop):
            answer = self._ask(encoded)
        if isinstance(answer, str):
            raise ImageError(answer)
        return answer

    @contextmanager
    def _running(self, stop: Stop) -> Iterator[None]:
        """The process runs while the block asks it. It is replaced if it has not answered completely."""
        is_complete = False
        try:
            if self.process is None or self.process.poll() is not None:  # the system kills it if memory is short
                self._end()
                self._start(stop)
            with stop.ending_by(self.process.kill):
                yield
            is_complete = True
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            if stop.is_set:
                seconds = f"{self.limits.decode_timeout:g} seconds"
                raise ImageError(f"it took longer than {seconds} to decode") from error
            if isinstance(error, RuntimeError):
                raise
            raise ImageError("it is broken (the decoder crashed)") from error  # or its answer is invalid
        finally:
            if not is_complete:
                self._end()

    def _start(self, stop: Stop) -> None:
        path = [*sys.path, str(Path(__file__).parents[2])]
        arguments = json.dumps([path, self.limits.max_pixels, self.limits.decode_memory, self.limits.decode_timeout])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", self.program, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff and others report broken images there
            env=os.environ
            | {
                "MALLOC_ARENA_MAX": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },  # more threads and arenas count against the memory limit
        )
        with stop.ending_by(self.process.kill):
            is_ready = self.process.stdout.readline(len(READY)) == READY
        if not is_ready:
            raise RuntimeError(f"Images cannot be decoded: {sys.executable!r} could not start a process.")

    def _ask(self, encoded: bytes) -> Image.Image | str:
        """Return the image, or the reason why it cannot be decoded."""
        requests, answers = self.process.stdin, self.process.stdout
        requests.write(LENGTH.pack(len(encoded)))
        requests.write(encoded)
        requests.flush()
        header = json.loads(answers.readline(10_000))
        return str(header["error"]) if "error" in header else self._read_pixels(header)

    def _read_pixels(self, header: dict) -> Image.Image:
        width, height = header["size"]
        if not 0 < width * height <= self.limits.max_pixels:
            raise ValueError("the decoder returned an image that is too large")
        return Image.frombytes("RGB", (width, height), self.process.stdout.read(3 * width * height))

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with suppress(OSError):  # data that the process has not read cannot be flushed
                self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


class VideoDecoder(Decoder):
    """A process that decodes one video at a time, for one thread."""

    program = _DECODE.format(module="video_decoding", function="serve_videos")

    def frames(self, encoded: bytes, fps: float, max_frames: int, stop: Stop) -> Iterator[tuple[float, Image.Image]]:
        """Decode a video, and yield seconds and pictures as `videos.read_video` does.

        Raises:
            ImageError: the video cannot be decoded within the limits.
        """
        request = {"num_bytes": len(encoded), "fps": fps, "max_frames": max_frames}
        with self._running(stop):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.write(encoded)
            self.process.stdin.flush()
            while "size" in (header := json.loads(self.process.stdout.readline(10_000))):
                yield float(header["seconds"]), self._read_pixels(header)
        if "error" in header:
            raise ImageError(str(header["error"]))
