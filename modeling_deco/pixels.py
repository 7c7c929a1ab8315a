# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""One picture, one set of pixels: whatever a picture comes as, the image processor gets the same upright RGB image.

`read_image` reads a path, a URL, bytes, a PIL image, an array or a tensor; `to_rgb` is the normalization itself. To
normalize twice changes nothing. Nothing here limits size or time: `images.PictureReader` reads
untrusted pictures.

This file is part of the code that a checkpoint carries for `trust_remote_code=True`. It needs Pillow and NumPy alone.
"""

import base64
import binascii
import io
import os
import urllib.parse
import urllib.request
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

NORMALIZATION = 1  # raised when `to_rgb` or `to_8_bit` makes other pixels: cached features are stale then

_CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGB and alpha
_TIMEOUT = 15.0  # seconds, for each step of a download
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def read_image(source, channels: str | None = None) -> Image.Image:
    """Read and normalize a picture.

    Args:
        source: a path, `http:`, `https:`, `file:` or `data:` URL, base64 text, an encoded picture as bytes, a binary
            file, what `datasets` keeps of an image that is not decoded (`{"bytes": ..., "path": ...}`), a PIL image,
            or an array or tensor as `image_from_array` takes it.
        channels: `"first"` or `"last"`: where an array has its channels, if its shape does not tell.

    Returns:
        The picture as `to_rgb` makes it; of an animation the first frame, of an open PIL image the current one.

    Raises:
        ValueError, OSError and others that decoders raise: it cannot be read.
    """
    if isinstance(source, dict) and (source.get("bytes") or source.get("path")):
        source = source.get("bytes") or source["path"]
    if isinstance(source, str):
        source = _named(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    if isinstance(source, os.PathLike) or hasattr(source, "read"):
        with open_image(source) as image:
            return to_rgb(image)
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return to_rgb(image_from_array(source, channels))
    raise ValueError("it is no path, URL, bytes, PIL image, array or tensor")


def _named(source: str) -> bytes | Path:
    """What a string names: a file, or an encoded picture."""
    scheme = source.partition(":")[0].lower()
    if scheme in ("http", "https"):
        request = urllib.request.Request(source, headers={"User-Agent": "modeling-deco", "Accept": "image/*"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return response.read()
    if scheme == "data":
        header, _, text = source.partition(",")
        data = urllib.parse.unquote_to_bytes(text)
        return base64.b64decode(data) if header.lower().endswith(";base64") else data
    if scheme == "file":
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(source).path))
    if os.path.isdir(source):
        raise ValueError("it is a folder")
    if not os.path.exists(source):
        try:
            if encoded := base64.b64decode("".join(source.split()), validate=True):
                open_image(io.BytesIO(encoded)).close()
                return encoded
        except (binascii.Error, UnicodeEncodeError, ValueError, OSError):
            pass
        raise ValueError("there is no such file")
    return Path(source)


def open_image(file: str | os.PathLike | BinaryIO, formats: list[str] | None = None) -> Image.Image:
    """`PIL.Image.open`, and HEIC where pillow-heif is installed.

    Args:
        file: a path or a binary file that can seek.
        formats: names of Pillow's formats that are tried. Default: all but EPS, which is a program that would be run.

    Raises:
        PIL.UnidentifiedImageError: the content is no picture of these formats, or HEIC without pillow-heif.
    """
    if _is_heif(file):
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise UnidentifiedImageError("HEIC is read with pillow-heif: pip install pillow-heif") from None
        register_heif_opener()
    Image.init()
    try:
        return Image.open(file, formats=formats or [name for name in Image.ID if name != "EPS"])
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError("its content is no picture that Pillow knows") from error


def _is_heif(file) -> bool:
    if hasattr(file, "read"):
        start, header = file.tell(), file.read(64)
        file.seek(start)
    else:
        with open(file, "rb") as opened:
            header = opened.read(64)
    # A box of type "ftyp" names the brands of the file; AVIF, of the same family, is Pillow's own.
    box = header[: int.from_bytes(header[:4], "big")]
    brands = {box[8:12], *(box[place : place + 4] for place in range(16, len(box), 4))}
    return header[4:8] == b"ftyp" and bool(brands & _HEIF_BRANDS) and not brands & {b"avif", b"avis"}


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image with 8 bits a channel.

    Turned as EXIF says. Transparent parts are white, of palettes too. Greys of 16 bit and of floating point are scaled
    as `to_8_bit` does; CMYK, LAB and the other modes of Pillow are converted.

    Raises:
        ValueError: the values of a grey of 32 bit or floating point are no picture's.
    """
    image = _upright(image)
    transparency = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip them at 255
        grey = np.asarray(image)
        image = Image.fromarray(to_8_bit(grey))
        if isinstance(transparency, int):  # PNG's: one grey is transparent
            image.putalpha(Image.fromarray(np.where(grey == transparency, 0, 255).astype(np.uint8)))
    elif image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in transparency)  # as Pillow reads 16-bit RGB
    if image.mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)  # a copy, without the orientation in its EXIF data
    except Exception:  # of malformed EXIF data, which are no reason to refuse the pixels
        image.load()  # what is wrong with the pixels themselves is raised here
        return image.copy()


def image_from_array(array, channels: str | None = None) -> Image.Image:
    """A PIL image of an array or tensor.

    Args:
        array: `(height, width)`, or `(height, width, channels)` or `(channels, height, width)` with 1 (grey), 2 (grey
            and alpha), 3 (RGB) or 4 (RGB and alpha) channels, of a type and range that `to_8_bit` knows.
        channels: `"first"` or `"last"`. Default: where the shape has 1 to 4.

    Raises:
        ValueError: it is no picture, or its channels may be first or last.
    """
    array = to_numpy(array)
    if array.ndim == 3:
        if channels_first(array.shape, channels):
            array = array.transpose(1, 2, 0)
        array = array[:, :, 0] if array.shape[2] == 1 else array
    elif array.ndim != 2:
        raise ValueError(f"its shape {tuple(array.shape)} is none of a picture")
    if 0 in array.shape:
        raise ValueError(f"its shape {tuple(array.shape)} has no pixels")
    return Image.fromarray(np.ascontiguousarray(to_8_bit(array)))


def to_numpy(array) -> np.ndarray:
    if hasattr(array, "detach"):  # a tensor
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return np.asarray(array)


def channels_first(shape, channels: str | None = None) -> bool:
    """Whether a picture of this shape has its channels first and not last."""
    candidates = [name for name, place in (("first", 0), ("last", -1)) if shape[place] in _CHANNELS]
    if channels is not None and channels not in candidates or not candidates:
        raise ValueError(
            f"its shape {tuple(shape)} is none of a picture: 1 to 4 channels {channels or 'first or last'}"
        )
    if channels is None and len(candidates) == 2:
        raise ValueError(
            f"its channels may be first or last in the shape {tuple(shape)}: say input_data_format="
            f'"channels_first" or "channels_last", or give a PIL image'
        )
    return (channels or candidates[0]) == "first"


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Values of pixels as 8 bit.

    The scale follows from the type and the largest value: unsigned 16 bit counts to 65535, truth values to 1; other
    whole numbers to 255, or to 65535 where one exceeds 255; floating point to 1, 255 or 65535, with some room for
    what interpolation adds at edges (up to twice these). NaN is black.

    Raises:
        ValueError: values are larger, or too many below 0 for a picture.
    """
    kind, dtype = values.dtype.kind, values.dtype
    if dtype == np.uint8:
        return values
    if kind == "b":
        return values * np.uint8(255)
    if kind not in "iuf":
        raise ValueError(f"its type {dtype} is none of pixels")
    finite = values[np.isfinite(values)] if kind == "f" else values
    smallest, largest = float(finite.min(initial=0)), float(finite.max(initial=0))
    if kind == "f":
        scale = next((scale for scale in (1, 255, 65535) if largest < 2 * scale), None)
    else:
        is_16_bit = dtype.itemsize == 2 and kind == "u" or largest > 255
        scale = (65535 if is_16_bit else 255) if largest <= 65535 else None
    if scale is None or smallest < -largest / 4:
        raise ValueError(
            f"its values from {smallest:g} to {largest:g} are not pixels from 0 to 1, 255 or 65535: scale them, "
            f"or, if they are what the model takes, pass do_rescale=False and do_normalize=False"
        )
    if kind == "f":
        values = np.nan_to_num(values * (255 / scale), nan=0.0, posinf=255.0, neginf=0.0).round()
    elif scale == 65535:
        values = values // 257
    return values.clip(0, 255).astype(np.uint8)
