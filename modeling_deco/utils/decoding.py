# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Decode images with Pillow: in this process or, for untrusted images, in a process that can be killed.

Only Pillow and NumPy are imported, so that such a process starts in a fraction of a second and takes 40 MB.
"""

import io
import json
import signal
import struct
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from PIL import AvifImagePlugin, Image

from ..pixels import open_image, to_rgb
from .errors import one_line

# Formats that are decoded in untrusted images and in data sets. Pillow knows 40 more: some take a minute for a few
# kilobytes, some contain larger images than their header says, and some start other programs.
UNTRUSTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


class ImageError(ValueError):
    """An image cannot be read. The message is one line that names the image and the reason."""


def decode(file: Path | BinaryIO, max_pixels: int, formats: tuple[str, ...] | None = UNTRUSTED_FORMATS) -> Image.Image:
    """Decode the image of a file, or the first frame of an animation, and convert it with `to_rgb`.

    Args:
        max_pixels: limit on width times height. It is compared with the header before anything is decoded.
        formats: Pillow's names of the formats. None means all formats that `open_image` opens.

    Raises:
        ImageError: the file is not an image of these formats, is broken, has too many pixels, or memory is short.
        OSError: the file system fails.
    """
    try:
        with open_image(file) if formats is None else Image.open(file, formats=formats) as image:
            _check_size(image, max_pixels)
            image.load()
            # the image in a container (ICO, ICNS) may have another size than the header says
            _check_size(image, max_pixels)
            return to_rgb(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        known = formats and f"its content is not an image of the formats {', '.join(formats[:-1])} and {formats[-1]}"
        raise ImageError(known or str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"it has more than the {max_pixels:,} pixels allowed") from error
    except MemoryError as error:
        raise ImageError("decoding it takes more memory than is allowed") from error
    except Exception as error:  # decoders raise many kinds of errors on broken files
        if isinstance(error, OSError) and error.strerror:  # of the file system
            raise
        raise ImageError(f"it is broken ({one_line(error)})") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"its {width} x {height} pixels are more than the {max_pixels:,} allowed")


# --- the process -----------------------------------------------------------------------------------------------------

# A request is the length of an image (8 bytes) and its bytes. The answer is a line of JSON and the RGB bytes.
LENGTH = struct.Struct("<Q")
READY = b"ready\n"


def serve_pictures(max_pixels: int, max_memory: int, timeout: float) -> None:
    """Decode images from standard input until it ends, or until one takes more than `timeout` seconds."""
    limit_process(max_memory, max_pixels)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    Image.init()
    answers.write(READY)
    answers.flush()
    while length := requests.read(LENGTH.size):
        encoded = requests.read(LENGTH.unpack(length)[0])
        set_alarm(timeout)  # if the parent is gone it cannot kill this process
        header, pixels = _answer(encoded, max_pixels)
        set_alarm(0)
        answers.write(json.dumps(header).encode() + b"\n")
        answers.write(pixels)
        answers.flush()
        del encoded, pixels  # a waiting process should be small


def limit_process(max_memory: int, max_pixels: int) -> None:
    """Prepare this process to decode untrusted files: limit its memory, and the pixels of Pillow's images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that closes the pipe
    with suppress(ImportError):  # Windows has no such limit; macOS ignores it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow also checks the images inside containers
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def set_alarm(seconds: float) -> None:
    """End this process in so many seconds; 0 revokes it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # an unhandled SIGALRM ends the process even inside a decoder


def _answer(encoded: bytes, max_pixels: int) -> tuple[dict, bytes]:
    try:
        image = decode(io.BytesIO(encoded), max_pixels)
        return {"size": image.size}, image.tobytes()
    except (ImageError, OSError, MemoryError) as error:
        return {"error": one_line(error)}, b""
