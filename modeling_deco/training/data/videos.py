# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The videos of a row: checked without opening them, measured without decoding them, read."""

import io
import math
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ... import DecoProcessor
from ...utils.errors import one_line
from ...videos import read_video
from .images import check_reference, is_remote
from .media import MIME_TYPES

_FRAMES = 8  # that are in memory in their own size


class Clip(NamedTuple):
    """The frames that were read of a video: the time of each, and their pixels `(num_frames, 3, height, width)`."""

    seconds: list[float]
    pixels: torch.Tensor


def read_clip(video: Any, processor: DecoProcessor) -> Clip:
    """Read a video with the processor's `fps` and `max_frames`.

    Raises:
        ValueError: it cannot be read.
    """
    seconds, pixels = [], []
    try:
        frames = read_video(video, processor.fps, processor.max_frames)
        while some := list(islice(frames, _FRAMES)):
            seconds += [second for second, _ in some]
            pixels.append(processor.frame_pixels([frame for _, frame in some]))
    except Exception as error:  # decoders and downloads raise many kinds
        raise ValueError(f"the video {_name(video)} cannot be read: {one_line(error)}") from error
    return Clip(seconds, torch.cat(pixels))


def videos_of_columns(row: Mapping[str, Any]) -> list[Any]:
    """The videos in the columns `videos` or `video`, not opened.

    Raises:
        ValueError: an entry is not a video, or both columns have some.
    """
    found = [_video_list(row[name]) for name in ("videos", "video") if row.get(name) is not None]
    found = [videos for videos in found if videos]
    if len(found) == 2:
        raise ValueError("the columns 'video' and 'videos' both have videos")
    videos = found[0] if found else []
    for video in videos:
        check_video(video)
    return videos


def _video_list(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple)) and not _are_frames(value) else [value]


def _are_frames(entries: list | tuple) -> bool:
    """Whether a list is one video, as its frames."""
    return bool(entries) and all(map(_is_picture, entries))


def _is_picture(entry: Any) -> bool:
    if isinstance(entry, Mapping):
        entry = entry.get("path")
    if isinstance(entry, (np.ndarray, torch.Tensor)):
        return entry.ndim in (2, 3)
    return isinstance(entry, Image.Image) or (isinstance(entry, (str, PurePath)) and _is_image_name(str(entry)))


def _is_image_name(name: str) -> bool:
    mime_type = MIME_TYPES.guess_type(name, strict=False)[0] or ""
    return mime_type.startswith("image/") and mime_type != "image/gif"


def _name(video: Any) -> str:
    if isinstance(video, Mapping):
        video = video.get("path")
    return repr(str(video)) if isinstance(video, (str, PurePath)) else "in the data"


def most_frames(video: Any, fps: float, max_frames: int) -> int:
    """The most frames that `read_video` gives of a video. Of a file, only the header is read."""
    if isinstance(video, (list, tuple, np.ndarray, torch.Tensor)):
        return min(len(video), max_frames)
    if isinstance(video, Mapping):
        video = video["path"] if video.get("bytes") is None else video["bytes"]
    if isinstance(video, str) and (video.startswith("data:") or is_remote(video)):
        return max_frames
    try:
        import av

        with av.open(io.BytesIO(video) if isinstance(video, (bytes, bytearray)) else str(video)) as container:
            seconds = (container.duration or 0) / av.time_base
    except (ImportError, OSError, ValueError):  # found when it is read
        return max_frames
    return min(max_frames, math.ceil(seconds * fps) + 1) if seconds > 0 else max_frames


def check_video(video: Any) -> None:
    """Check a video without opening it: a path, a URL, bytes, `{"bytes": ..., "path": ...}`, a list of frames, or an
    array `(frames, height, width, channels)`.

    Raises:
        ValueError: it is not a video, or its file does not exist.
    """
    if isinstance(video, (bytes, bytearray)):
        return
    if isinstance(video, (np.ndarray, torch.Tensor)):
        if video.ndim != 4:
            raise ValueError(f"a video is an array of {video.ndim} dimensions")
        return
    if isinstance(video, (list, tuple)):
        if not video:
            raise ValueError("a video is a list of no frames")
        for frame in video:
            check_reference(frame)
        return
    if isinstance(video, Mapping):
        if video.get("bytes") is None and video.get("path") is None:
            raise ValueError("a video has neither bytes nor a path")
        if video.get("bytes") is not None:
            return
        video = video["path"]
    if not isinstance(video, (str, PurePath)):
        raise ValueError(f"a video is {'null' if video is None else 'of type ' + type(video).__name__}")
    name = str(video)
    if not name.strip():
        raise ValueError("a video is an empty path")
    if not name.startswith("data:") and not is_remote(name):
        mime_type = MIME_TYPES.guess_type(name, strict=False)[0]
        if mime_type is not None and not mime_type.startswith("video/") and mime_type != "image/gif":
            raise ValueError(f"{name!r} is not a video, but {mime_type}")
        if not os.path.isfile(name):
            raise ValueError(f"there is no video {name!r}")
