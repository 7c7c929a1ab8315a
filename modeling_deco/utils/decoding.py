# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding of pictures by Pillow: in this process or, for untrusted pictures, in one that can be killed.

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

# The formats that are decoded of untrusted pictures and of data sets. Pillow knows 40 more: some take a minute for a
# few kilobytes, some contain larger pictures than their header says, some start other programs.
UNTRUSTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


class ImageError(ValueError):
    """A picture cannot be read; the message is one line that names it and says why."""


def decode(file: Path | BinaryIO, max_pixels: int, formats: tuple[str, ...] | None = UNTRUSTED_FORMATS) -> Image.Image:
    """The picture of a file as `to_rgb` makes it; of an animation the first frame.

    Args:
        max_pixels: width times height. A header that says more is refused before anything is decoded.
        formats: names that Pillow has for them. None is all that `open_image` opens.

    Raises:
        ImageError: the file is no picture of these formats, is broken, has more pixels, or memory is short.
        OSError: the file system's.
    """
    try:
        with open_image(file) if formats is None else Image.open(file, formats=formats) as image:
            _check_size(image, max_pixels)
            image.load()
            _check_size(image, max_pixels)  # a container (ICO, ICNS) holds pictures of other sizes than it says
            return to_rgb(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        known = formats and f"its content is no picture of the formats {', '.join(formats[:-1])} and {formats[-1]}"
        raise ImageError(known or str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"it has more than the {max_pixels:,} pixels allowed") from error
    except MemoryError as error:
        raise ImageError("decoding it takes more memory than is allowed") from error
    except Exception as error:  # decoders raise many kinds on broken files
        if isinstance(error, OSError) and error.strerror:  # the file system's
            raise
        raise ImageError(f"it is broken ({one_line(error)})") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"its {width} x {height} pixels are more than the {max_pixels:,} allowed")


# --- the process -----------------------------------------------------------------------------------------------------

# A picture comes as its length (8 bytes) and its bytes. The answer is a line of JSON, then the RGB bytes.
LENGTH = struct.Struct("<Q")
READY = b"ready\n"


def serve_pictures(max_pixels: int, max_memory: int, timeout: float) -> None:
    """Decode pictures from standard input until it ends, each within `timeout` seconds or this process dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes the pipe
    with suppress(ImportError):  # Windows has no such limit; macOS ignores it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own checks, of what is inside containers too
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    Image.init()
    answers.write(READY)
    answers.flush()
    while length := requests.read(LENGTH.size):
        encoded = requests.read(LENGTH.unpack(length)[0])
        _set_alarm(timeout)  # the parent kills at this time too, where it still can
        header, pixels = _answer(encoded, max_pixels)
        _set_alarm(0)
        answers.write(json.dumps(header).encode() + b"\n")
        answers.write(pixels)
        answers.flush()
        del encoded, pixels  # a process that waits is small


def _answer(encoded: bytes, max_pixels: int) -> tuple[dict, bytes]:
    try:
        image = decode(io.BytesIO(encoded), max_pixels)
        return {"size": image.size}, image.tobytes()
    except (ImageError, OSError, MemoryError) as error:
        return {"error": one_line(error)}, b""


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, unhandled, ends the process even inside a decoder
