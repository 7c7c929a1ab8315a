# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Decodes untrusted pictures in a process of their own."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ..utils.decoding import LENGTH, READY, ImageError
from .limits import ImageLimits, Stop

# In isolated mode nothing is imported from the working directory before the path is the parent's.
_DECODE = """
import json, sys
sys.path[:], *limits = json.loads(sys.argv[1])
from modeling_deco.utils.decoding import serve_pictures
serve_pictures(*limits)
"""


class Decoder:
    """A process that decodes one picture at a time. Used by one thread."""

    def __init__(self, limits: ImageLimits):
        self.limits = limits
        self.process = None

    def __del__(self):
        self._end()

    def decode(self, encoded: bytes, stop: Stop) -> Image.Image:
        """
        Raises:
            ImageError: it cannot be decoded, or not within the limits.
        """
        is_whole = False
        try:
            if self.process is None or self.process.poll() is not None:  # or the system, short of memory, killed it
                self._end()
                self._start(stop)
            with stop.ending_by(self.process.kill):
                answer = self._ask(encoded)
            is_whole = True
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            if stop.is_set:
                seconds = f"{self.limits.decode_timeout:g} seconds"
                raise ImageError(f"it took longer than {seconds} to decode") from error
            if isinstance(error, RuntimeError):
                raise
            raise ImageError("it is broken (the decoder crashed)") from error  # or answers what it should not
        finally:
            if not is_whole:
                self._end()
        if isinstance(answer, str):
            raise ImageError(answer)
        return answer

    def _start(self, stop: Stop) -> None:
        path = [*sys.path, str(Path(__file__).parents[2])]
        arguments = json.dumps([path, self.limits.max_pixels, self.limits.decode_memory, self.limits.decode_timeout])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _DECODE, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff and others write there about broken pictures
            env=os.environ
            | {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"},  # more count against the limit of memory
        )
        with stop.ending_by(self.process.kill):
            is_ready = self.process.stdout.readline(len(READY)) == READY
        if not is_ready:
            raise RuntimeError(f"Pictures cannot be decoded: {sys.executable!r} could not start a process for it.")

    def _ask(self, encoded: bytes) -> Image.Image | str:
        """The picture, or why there is none."""
        requests, answers = self.process.stdin, self.process.stdout
        requests.write(LENGTH.pack(len(encoded)))
        requests.write(encoded)
        requests.flush()
        header = json.loads(answers.readline(10_000))
        if "error" in header:
            return str(header["error"])
        width, height = header["size"]
        if not 0 < width * height <= self.limits.max_pixels:
            raise ValueError("no picture that was asked for is so large")
        return Image.frombytes("RGB", (width, height), answers.read(3 * width * height))

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with suppress(OSError):  # what it has not read cannot be written
                self.process.stdin.close()
            self.process.stdout.close()
            self.process = None
