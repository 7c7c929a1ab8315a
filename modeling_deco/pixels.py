# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Read pictures of every kind, so that the image processor gets the same upright RGB image from all of them.

`read_image` reads a path, a URL, bytes, a PIL image, an array or a tensor. `to_rgb` normalizes a PIL image, and leaves
a normalized one unchanged. Nothing here limits size or time: read untrusted pictures with
`inference.images.PictureReader`.

This file is saved with every checkpoint for `trust_remote_code=True`. It needs only Pillow and NumPy.
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

NORMALIZATION = 1  # to be raised when `to_rgb` or `to_8_bit` changes pixels, which makes cached features stale

_CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGB and alpha
_TIMEOUT = 15.0  # seconds, for each step of a download
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def read_image(source, channels: str | None = None) -> Image.Image:
    """Read and normalize a picture.

    Args:
        source: a path, `http:`, `https:`, `file:` or `data:` URL, base64 text, an encoded picture as bytes, a binary
            file, an undecoded image of `datasets` (`{"bytes": ..., "path": ...}`), a PIL image, or an array or tensor
            that `image_from_array` takes.
        channels: `"first"` or `"last"`, the position of an array's channels if the shape is ambiguous.

    Returns:
        The picture as `to_rgb` makes it: the first frame of an animation, the current frame of a PIL image.

    Raises:
        ValueError, OSError or a decoder's own error: the picture cannot be read.
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
    raise ValueError("it is not a path, URL, bytes, PIL image, array or tensor")


def _named(source: str) -> bytes | Path:
    """The file that a string names, or the encoded picture that it holds or links to."""
    scheme = source.partition(":")[0].lower()
    if scheme in ("http", "https"):
        request = urllib.request.Request(source, headers={"User-Agent": "modeling-deco", "Accept": "image/*"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return response.read()
    if scheme not in ("data", "file") and not os.path.exists(source):
        try:
            if encoded := base64.b64decode("".join(source.split()), validate=True):
                open_image(io.BytesIO(encoded)).close()
                return encoded
        except (binascii.Error, UnicodeEncodeError, ValueError, OSError):
            pass
    return local(source)


def local(source: str) -> bytes | Path:
    """The content of a `data:` URL, or the file that a `file:` URL or a path names."""
    scheme = source.partition(":")[0].lower()
    if scheme == "data":
        header, _, text = source.partition(",")
        data = urllib.parse.unquote_to_bytes(text)
        return base64.b64decode(data) if header.lower().endswith(";base64") else data
    if scheme == "file":
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(source).path))
    if os.path.isdir(source):
        raise ValueError("it is a folder")
    if not os.path.exists(source):
        raise ValueError("there is no such file")
    return Path(source)


def open_image(file: str | os.PathLike | BinaryIO, formats: list[str] | None = None) -> Image.Image:
    """`PIL.Image.open`, and HEIC where pillow-heif is installed.

    Args:
        file: a path or a binary file that can seek.
        formats: names of the Pillow formats to try. Default: all but EPS, which contains a program that would be run.

    Raises:
        PIL.UnidentifiedImageError: the content has none of these formats, or is HEIC and pillow-heif is not installed.
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
        raise UnidentifiedImageError("its content is not an image that Pillow can read") from error


def _is_heif(file) -> bool:
    if hasattr(file, "read"):
        start, header = file.tell(), file.read(64)
        file.seek(start)
    else:
        with open(file, "rb") as opened:
            header = opened.read(64)
    # A box of type "ftyp" names the file's brands. Pillow reads AVIF, which has the same kind of box, by itself.
    box = header[: int.from_bytes(header[:4], "big")]
    brands = {box[8:12], *(box[place : place + 4] for place in range(16, len(box), 4))}
    return header[4:8] == b"ftyp" and bool(brands & _HEIF_BRANDS) and not brands & {b"avif", b"avis"}


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image to upright RGB with 8 bits per channel.

    The image is rotated as its EXIF data say. Transparent parts become white, also in palettes. 16-bit and
    floating-point greyscale is scaled by `to_8_bit`. CMYK, LAB and Pillow's other modes are converted.

    Raises:
        ValueError: the values of a 32-bit or floating-point greyscale image are not pixels.
    """
    image = _upright(image)
    transparency = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip them at 255
        grey = np.asarray(image)
        image = Image.fromarray(to_8_bit(grey))
        if isinstance(transparency, int):  # in PNG, the one grey value that is transparent
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
    except Exception:  # malformed EXIF data are no reason to refuse the pixels
        image.load()  # raises if the pixels themselves are broken
        return image.copy()


def image_from_array(array, channels: str | None = None) -> Image.Image:
    """Convert an array or tensor to a PIL image.

    Args:
        array: `(height, width)`, or `(height, width, channels)` or `(channels, height, width)` with 1 (grey), 2 (grey
            and alpha), 3 (RGB) or 4 (RGB and alpha) channels, with a type and range that `to_8_bit` takes.
        channels: `"first"` or `"last"`. Default: the position where the shape has 1 to 4.

    Raises:
        ValueError: the array is not a picture, or its shape is ambiguous and `channels` is None.
    """
    array = to_numpy(array)
    if array.ndim == 3:
        if channels_first(array.shape, channels):
            array = array.transpose(1, 2, 0)
        array = array[:, :, 0] if array.shape[2] == 1 else array
    elif array.ndim != 2:
        raise ValueError(f"its shape {tuple(array.shape)} is not a picture's")
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
            f"its shape {tuple(shape)} is not a picture's: it needs 1 to 4 channels, {channels or 'first or last'}"
        )
    if channels is None and len(candidates) == 2:
        raise ValueError(
            f"its channels may be first or last in the shape {tuple(shape)}: say input_data_format="
            f'"channels_first" or "channels_last", or give a PIL image'
        )
    return (channels or candidates[0]) == "first"


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Convert pixel values to 8 bits.

    The type and the largest value determine the scale: 65535 for unsigned 16-bit integers, 1 for booleans, 255 for
    other integers (65535 if a value exceeds 255), and 1, 255 or 65535 for floating point. Floating-point values may be
    up to twice as large, since interpolation overshoots at edges. NaN becomes black.

    Raises:
        ValueError: values are larger than that, or too far below 0.
    """
    kind, dtype = values.dtype.kind, values.dtype
    if dtype == np.uint8:
        return values
    if kind == "b":
        return values * np.uint8(255)
    if kind not in "iuf":
        raise ValueError(f"its type {dtype} is not one of pixels")
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
