# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Read images from paths, URLs, data URLs, standard input and uploads.

`read_image` is for the images of the user who runs the program. A `PictureReader` is for the images that others send
to the server or the page: it decodes them in a process that can be killed, and connects only to public addresses.
"""

import base64
import binascii
import io
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..pixels import local
from ..utils.decoding import ImageError, decode
from ..videos import looks_like_video
from .downloads import download
from .limits import ImageLimits, Stop


def read_image(
    source: str | Path | bytes | BinaryIO,
    *,
    limits: ImageLimits = ImageLimits(),  # noqa: B008  frozen
) -> Image.Image:
    """Read a trusted image. Use a `PictureReader` for untrusted images and URLs.

    Files may have any format that Pillow decodes itself, URLs only those of `UNTRUSTED_FORMATS`.

    Args:
        source: path, `file:`, `http:`, `https:` or `data:` URL, encoded image as bytes, or open binary file.
        limits: see `ImageLimits`.

    Returns:
        An RGB image, rotated as its EXIF data say. Transparent parts are white. 16-bit grey is scaled to 8 bits.
        Floating point is scaled from 0 to 1 or, if a value exceeds 1, from 0 to 255. Of an animation it is the first
        frame.

    Raises:
        ImageError: the image cannot be read, is too large, takes too long, or is not allowed.
    """
    with named(source):
        if isinstance(source, str) and not _is_file(source):
            encoded = fetch(source, limits, allow_files=False, allow_private=True, stop=Stop())
            return decode(io.BytesIO(encoded), limits.max_pixels)
        return decode(_own(source, limits), limits.max_pixels, formats=None)


def is_video(source) -> bool:
    """Whether a trusted path, URL or buffered file is a video by its content. What cannot be read is none."""
    try:
        if hasattr(source, "read"):
            return hasattr(source, "peek") and looks_like_video(source.peek(512))
        source = str(source)
        if source.partition(":")[0].lower() in ("http", "https"):
            request = urllib.request.Request(source, headers={"User-Agent": "modeling-deco"})
            with urllib.request.urlopen(request, timeout=ImageLimits().timeout) as response:
                return looks_like_video(response.read(512))
        content = local(source)
        if isinstance(content, bytes):
            return looks_like_video(content[:512])
        if not content.is_file():  # a pipe can be read only once
            return False
        with content.open("rb") as file:
            return looks_like_video(file.read(512))
    except (OSError, ValueError, HTTPException):
        return False


@contextmanager
def named(source, kind: str = "image") -> Iterator[None]:
    name = f"The {kind}"
    if isinstance(source, str) and source[:5].lower() != "data:":
        shown = re.sub(r"^(https?://)[^/@]*@", r"\1...@", source, flags=re.IGNORECASE)  # keeps passwords out of logs
        name = f"The {kind} {shown if len(shown) <= 120 else shown[:117] + '...'!r}"
    elif isinstance(source, Path):
        name = f"The {kind} {str(source)!r}"
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name} cannot be read: {error}.") from error.__cause__
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror or error}.") from error


def _scheme(source: str) -> str:
    return source.partition(":")[0].lower()


def _is_file(source: str) -> bool:
    return _scheme(source) not in ("http", "https", "data")


def _own(source: str | Path | bytes | BinaryIO, limits: ImageLimits) -> Path | BinaryIO:
    """Return what Pillow can open: a file of any size, or the content of a pipe or device up to the limit."""
    if isinstance(source, str):
        source = _path_of_url(source) if _scheme(source) == "file" else Path(source)
    if isinstance(source, bytes):
        return io.BytesIO(_bounded(source, limits))
    if not isinstance(source, Path):
        return io.BytesIO(_bounded(source.read(limits.max_bytes + 1), limits))
    if not source.exists():
        raise ImageError("there is no such file")
    if source.is_dir():
        raise ImageError("it is a folder")
    if source.is_file():
        return source
    with source.open("rb") as pipe:
        return io.BytesIO(_bounded(pipe.read(limits.max_bytes + 1), limits))


def fetch(source: str | bytes, limits: ImageLimits, allow_files: bool, allow_private: bool, stop: Stop) -> bytes:
    """Return the encoded bytes of an untrusted image or URL."""
    if isinstance(source, bytes):
        return _bounded(source, limits)
    if _scheme(source) == "data":
        return _bounded(_data_of_url(source, limits), limits)
    if not _is_file(source):
        return _bounded(download(source, limits, allow_private, stop), limits)
    if not allow_files:
        raise ImageError("only http, https and data URLs are read")
    path = _path_of_url(source) if _scheme(source) == "file" else Path(source)
    if not path.is_file():  # reading a pipe could block
        raise ImageError("there is no such file")
    with path.open("rb") as file:
        return _bounded(file.read(limits.max_bytes + 1), limits)


def _bounded(encoded: bytes, limits: ImageLimits) -> bytes:
    if not encoded:
        raise ImageError("it is empty")
    if len(encoded) > limits.max_bytes:
        raise ImageError(f"it has more than {limits.max_bytes / 2**20:.4g} MiB")
    return encoded


def _path_of_url(url: str) -> Path:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(f"it is a file on another machine, {parts.netloc!r}")
    return Path(urllib.request.url2pathname(parts.path))


def _data_of_url(url: str, limits: ImageLimits) -> bytes:
    header, comma, data = url.partition(",")
    if not comma:
        raise ImageError("it is a data URL without data (data:image/png;base64,...)")
    if not header.lower().endswith(";base64"):
        return _unquote(data)
    if len(data) > limits.max_bytes * 4 // 3 + 4:  # checked before a second copy is made
        return _bounded(data.encode(), limits)
    try:
        return base64.b64decode(_unquote(data), validate=True)
    except binascii.Error as error:
        raise ImageError("its data are not base64") from error


def _unquote(data: str) -> bytes:
    """Decode percent-encoding such as %41, as quoted-printable text (=41).

    urllib's `unquote_to_bytes` takes a hundred bytes of memory for each of them, which is gigabytes for one request.
    """
    return binascii.a2b_qp(data.encode(errors="replace").replace(b"=", b"=3D").replace(b"%", b"="))
