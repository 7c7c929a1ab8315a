# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny videos, made with PyAV: frames of one grey each, so that a frame shows which one it is."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

STEP = 20  # between the grey values of two frames


def frames(number: int, size=(32, 32)) -> list[np.ndarray]:
    """Frame i has the grey value `STEP * i`, from the start again beyond white."""
    return [np.full((size[1], size[0], 3), STEP * i % 260, np.uint8) for i in range(number)]


def encode(
    pictures,
    rate=10,
    container="mp4",
    codec="libx264",
    pixels="yuv420p",
    times: list[float] | None = None,
    source_format="rgb24",
    **options,
) -> bytes:
    """Encode arrays `(height, width, channels)` as a video file.

    Args:
        times: seconds at which the frames start. Default: `rate` of them a second.
        options: of the encoder.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options={name: str(value) for name, value in options.items()})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for position, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, source_format)
            if times is not None:
                frame.pts, frame.time_base = round(times[position] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def video(number: int = 20, rate=10, **options) -> bytes:
    """An MP4 file of `number` frames, `rate` of them a second."""
    return encode(frames(number), rate, **options)


def numbers(found) -> list[int]:
    """Which frames `(seconds, picture)` these are, by their grey values."""
    return [round(float(np.asarray(picture).mean()) / STEP) for _, picture in found]


def sound() -> bytes:
    """A WAV file, with half a second of silence."""
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def animation(number: int, file_format: str, milliseconds: int = 100) -> bytes:
    file = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in frames(number)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    first.save(file, file_format, save_all=True, append_images=rest, duration=milliseconds, loop=0, **options)
    return file.getvalue()


def turned(encoded: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 file with another display matrix: a, b, c and d, which move a pixel (x, y) to (a x + c y, b x + d y)."""
    place = encoded.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    values = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    return encoded[:place] + values + encoded[place + len(values) :]
