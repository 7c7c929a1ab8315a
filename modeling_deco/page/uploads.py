# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Images and videos that users have uploaded. An event's data comes from a request, which can hold anything."""

from functools import cache
from pathlib import Path

from gradio.utils import get_upload_folder  # private, seen in gradio 6.31
from PIL import Image

from ..inference.picture_reader import PictureReader, VideoReader
from ..utils.decoding import ImageError
from ..videos import PreparedVideo


def upload_folder() -> Path:
    """The folder that gradio writes uploads to."""
    return Path(get_upload_folder())


def upload_path(upload):
    """The path that an event names, which may be of any type. `read_upload` checks it."""
    if isinstance(upload, dict) and isinstance(upload.get("video"), dict):
        upload = upload["video"]
    return upload.get("path") if isinstance(upload, dict) else None


def read_upload(path: str) -> Image.Image:
    """Read an image of the upload folder.

    Raises:
        ImageError: the path is not that of an upload, or the file is not an image within the limits.
    """
    return _reader().read_sync(_content(path, "image"))


def read_video_upload(path: str, processor) -> PreparedVideo:
    """Read a video of the upload folder, and prepare it for the model.

    Raises:
        ImageError: the path is not that of an upload, or the file is not a video within the limits.
    """
    encoded = _content(path, "video")
    return _video_reader().read_frames_sync(encoded, processor.fps, processor.max_frames, processor.prepare_video)


def _content(path: str, kind: str) -> bytes:
    try:
        # gradio checks where a path leads only if the request declares it to be one
        file = Path(path).resolve()
        file.relative_to(upload_folder().resolve())
        return file.read_bytes()
    except (TypeError, ValueError, OSError):  # these errors name folders of this machine
        message = f"The {kind} cannot be read: it was not uploaded, or the upload has expired. Upload it again."
        raise ImageError(message) from None


@cache
def _reader() -> PictureReader:
    return PictureReader()  # its processes end with this one


@cache
def _video_reader() -> VideoReader:
    return VideoReader()
