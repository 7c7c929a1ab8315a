# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Fields of a row that seem to contain images, videos or sounds, though nothing reads them there."""

import re
from collections.abc import Mapping
from mimetypes import MimeTypes
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image

from .columns import COLUMNS

_MEDIUM = r"(?:image|img|picture|photo|pic|video|audio|frame|screenshot|media|pixel_value)s?"
_HOLDER = r"(?:[_-]?(?:path|file|filename|file_name|name|url|uri|link|data|byte|base64|b64|list)s?)"
_MEDIA_COLUMN = re.compile(rf"(?:.*[_-])?{_MEDIUM}(?:[_-]?\d+)?{_HOLDER}?", re.IGNORECASE)
_ABOUT_AN_IMAGE = re.compile(rf"(?:image|img|picture|photo|pic)s?{_HOLDER}", re.IGNORECASE)
_ABOUT_A_VIDEO = re.compile(rf"videos?{_HOLDER}", re.IGNORECASE)
MIME_TYPES = MimeTypes()  # Python's own table; the one of the machine may differ


def unread_media(row: Mapping[str, Any], has_images: bool, has_videos: bool = False) -> list[str]:
    """The columns that nothing reads and that seem to contain images, videos or sounds.

    Args:
        row: of a data set, or one part of a message.
        has_images: whether the row has images that are read. If so, a column with the path or URL of an image is
            taken to be about those.
        has_videos: the same for videos.
    """
    about = {"image": _ABOUT_AN_IMAGE} if has_images else {}
    about |= {"video": _ABOUT_A_VIDEO} if has_videos else {}
    return [
        name
        for name, value in row.items()
        if name not in COLUMNS
        and is_media(name, value)
        and not any(_is_about(kind, column, name, value) for kind, column in about.items())
    ]


def _is_about(kind: str, column: re.Pattern, name: str, value: Any) -> bool:
    return bool(column.fullmatch(name)) or not _MEDIA_COLUMN.fullmatch(name) and _type_of(value) == kind


def is_media(name: str, value: Any) -> bool:
    """Whether a field seems to contain images, videos or sounds."""
    if isinstance(value, (list, tuple)):
        is_array = bool(value) and isinstance(value[0], (list, tuple)) and _MEDIA_COLUMN.fullmatch(name)
        return bool(is_array) or any(is_media(name, entry) for entry in value)
    if isinstance(value, Mapping):
        is_file = value.get("bytes") is not None or value.get("path") is not None
        return is_file or _type_of(value) in ("image", "video", "audio")
    if isinstance(value, (Image.Image, bytes)) or type(value).__name__.endswith("Decoder"):  # a video of datasets
        return True
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return bool(_MEDIA_COLUMN.fullmatch(name))
    if not isinstance(value, (str, PurePath)) or not str(value).strip():
        return False
    return bool(_MEDIA_COLUMN.fullmatch(name)) or _type_of(value) in ("image", "video", "audio")


def _type_of(value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        return next((kind for kind in map(_type_of, value) if kind), None)
    if isinstance(value, Mapping):
        return next((kind for kind in map(_type_of, value.values()) if kind), None)
    if isinstance(value, Image.Image):
        return "image"
    if not isinstance(value, (str, PurePath)) or len(str(value)) > 500 or re.search(r"\s", str(value)):
        return None  # a text that happens to end like a file name
    return (MIME_TYPES.guess_type(str(value), strict=False)[0] or "").partition("/")[0] or None
