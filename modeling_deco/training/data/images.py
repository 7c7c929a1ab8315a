# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The images of a row: checked without opening them, opened, measured."""

import base64
import binascii
import io
import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from ... import pixels
from ...utils.errors import one_line
from .media import MIME_TYPES


def images_of_columns(row: Mapping[str, Any]) -> list[Any]:
    """The images in the columns `images` or `image`, not opened.

    Raises:
        ValueError: an entry is not an image, or the two columns differ.
    """
    found = {name: _image_list(row[name]) for name in ("images", "image") if row.get(name) is not None}
    found = {name: images for name, images in found.items() if images}
    if len(found) == 2 and not _are_same(*found.values()):
        raise ValueError("the columns 'image' and 'images' have different images")
    images = next(iter(found.values()), [])
    for image in images:
        check_reference(image)
    return images


def _image_list(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _are_same(some: list, others: list) -> bool:
    """Whether both lists name the same files. Pictures and bytes are not compared."""
    return all(isinstance(image, (str, PurePath)) for image in some) and some == others


def check_reference(image: Any) -> None:
    """Check an image without opening it.

    Raises:
        ValueError: it is not an image, or its file does not exist.
    """
    if isinstance(image, (Image.Image, bytes, bytearray)):
        return
    if isinstance(image, (np.ndarray, torch.Tensor)):
        if image.ndim not in (2, 3):
            raise ValueError(f"an image is an array of {image.ndim} dimensions")
        return
    if isinstance(image, Mapping):
        if image.get("bytes") is None and image.get("path") is None:
            raise ValueError("an image has neither bytes nor a path")
        if image.get("bytes") is not None:
            return
        image = image["path"]
    if not isinstance(image, (str, PurePath)):
        raise ValueError(f"an image is {'null' if image is None else 'of type ' + type(image).__name__}")
    name = str(image)
    if not name.strip():
        raise ValueError("an image is an empty path")
    if name.startswith("data:"):
        bytes_of_url(name)
    elif not is_remote(name):
        mime_type = MIME_TYPES.guess_type(name, strict=False)[0]
        if mime_type is not None and not mime_type.startswith("image/"):
            raise ValueError(f"{name!r} is not an image, but {mime_type}")
        if not os.path.isfile(name):
            raise ValueError(f"there is no image {name!r}")


def is_remote(name: str) -> bool:
    return "://" in name


def open_image(image: Any) -> Any:
    """Decode an image that a row refers to; one that is already decoded is returned as it is.

    Raises:
        ValueError: the image cannot be read.
    """
    if isinstance(image, (Image.Image, np.ndarray, torch.Tensor)):
        return image
    check_reference(image)
    try:
        if isinstance(image, str) and is_remote(image):  # datasets reads hf:// and zip:// too
            return ImageFeature().decode_example({"bytes": None, "path": image})
        return pixels.read_image(image)
    except Exception as error:  # decoders and downloads raise many kinds
        shown = image.get("path") if isinstance(image, Mapping) else image
        name = repr(str(shown)) if isinstance(shown, (str, PurePath)) else "in the data"
        raise ValueError(f"the image {name} cannot be read: {one_line(error)}") from error


def bytes_of_url(url: str) -> bytes:
    """The image that a data URL contains."""
    header, _, encoded = url.partition(",")
    try:
        if not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ValueError
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"an image is a data URL that is not the base64 of an image: {url[:40]!r}") from None


def image_size(image: Any) -> tuple[int, int]:
    """`(height, width)` of an image, after the rotation that its EXIF data ask for.

    Only the beginning of an image is read that is not decoded yet.

    Raises:
        ValueError: the image cannot be read.
    """
    if not isinstance(image, Image.Image):
        is_dict = isinstance(image, Mapping)
        source = image["path"] if is_dict and image.get("bytes") is None else image["bytes"] if is_dict else image
        if isinstance(source, str) and (source.startswith("data:") or is_remote(source)):
            source = open_image(source)
        try:
            if isinstance(source, (bytes, bytearray)):
                source = io.BytesIO(source)
            image = source if not isinstance(source, (str, PurePath, io.BytesIO)) else pixels.open_image(source)
        except Exception as error:  # decoders raise many kinds
            raise ValueError(f"an image cannot be read: {one_line(error)}") from error
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    size = image.height, image.width
    return size[::-1] if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8) else size
