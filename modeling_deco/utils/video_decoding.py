# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Decode untrusted videos in a process that can be killed.

PyAV is imported by the first video file, so that such a process starts as fast as one for images.
"""

import io
import json
import sys
from collections.abc import Iterator

from PIL import Image

from ..videos import read_video
from .decoding import READY, ImageError, limit_process, set_alarm
from .errors import one_line

_NUM_THREADS = 2  # of FFmpeg: a video of others does not take all cores


def decode_video(
    encoded: bytes, max_pixels: int, fps: float, max_frames: int, timeout: float
) -> Iterator[tuple[float, Image.Image]]:
    """`read_video` of an encoded video, with one kind of error.

    Raises:
        ImageError: it is not a video, is broken, has too many pixels, takes too long, or memory is short.
    """
    file = io.BytesIO(encoded)
    try:
        yield from read_video(file, fps, max_frames, timeout=timeout, max_pixels=max_pixels, num_threads=_NUM_THREADS)
    except MemoryError as error:
        raise ImageError("decoding it takes more memory than is allowed") from error
    except Exception as error:  # decoders raise many kinds of errors on broken files
        raise ImageError(one_line(error)) from error


def serve_videos(max_pixels: int, max_memory: int, timeout: float) -> None:
    """Decode videos from standard input until it ends, or until one takes more than `timeout` seconds.

    A request is a line of JSON, which has the video's length as `num_bytes`, and its bytes. The answer is a line of
    JSON and the RGB bytes for each frame, and a last line without a frame.
    """
    limit_process(max_memory, max_pixels)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    Image.init()
    answers.write(READY)
    answers.flush()
    while line := requests.readline():
        request = json.loads(line)
        encoded = requests.read(request["num_bytes"])
        set_alarm(timeout)
        for header, pixels in _answer(encoded, max_pixels, request["fps"], request["max_frames"], timeout):
            answers.write(json.dumps(header).encode() + b"\n")
            answers.write(pixels)
            answers.flush()
        set_alarm(0)
        del encoded


def _answer(encoded: bytes, *options) -> Iterator[tuple[dict, bytes]]:
    try:
        for seconds, frame in decode_video(encoded, *options):
            yield {"seconds": seconds, "size": frame.size}, frame.tobytes()
        yield {}, b""
    except ImageError as error:
        yield {"error": one_line(error)}, b""
