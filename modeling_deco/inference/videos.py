# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Read and encode videos a few frames at a time, so that only their features stay in memory."""

from collections.abc import Iterable

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..utils.decoding import ImageError
from ..videos import PreparedVideo, in_chunks, read_video
from .images import named

_FRAMES_PER_CHUNK = 16


def encode_video(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    source,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    pooled_video_grid_size=None,
    frames_per_token_grid: int | None = None,
) -> PreparedVideo:
    """Read and encode a trusted video. Use a `PictureReader` for untrusted ones.

    Args:
        source: a path, URL, bytes or frames, as `videos.read_video` takes.
        fps, max_frames, pooled_video_grid_size, frames_per_token_grid: as in `DecoProcessor.__call__`.

    Returns:
        The video, for `{"type": "video", "video": ...}` in a message. No pixels are kept.

    Raises:
        ImageError: the video cannot be read.
        ImportError: PyAV is not installed.
        ValueError: the model takes no videos, or the grid does not fit it.
    """
    if model.config.video_token_id is None:
        raise ValueError("The model takes no videos: its config has no video_token_id.")
    rate = processor.fps if fps is None else fps
    most = processor.max_frames if max_frames is None else max_frames
    frames = _named(read_video(source, rate, most), source)
    return encode_frames(model, processor, frames, pooled_video_grid_size, frames_per_token_grid)


def _named(frames: Iterable[tuple[float, Image.Image]], source):
    with named(source, "video"):
        try:
            yield from frames
        except ValueError as error:
            raise ImageError(str(error)) from error


@torch.inference_mode()
def encode_frames(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    frames: Iterable[tuple[float, Image.Image]],
    pooled_video_grid_size=None,
    frames_per_token_grid: int | None = None,
) -> PreparedVideo:
    """Encode a video's frames as they are read.

    Args:
        frames: seconds and picture of each.
        pooled_video_grid_size, frames_per_token_grid: as in `DecoProcessor.__call__`.
    """
    averaged = frames_per_token_grid or processor.frames_per_token_grid
    seconds: list[float] = []
    features: list[torch.Tensor] = []
    for chunk in in_chunks(frames, averaged * max(1, _FRAMES_PER_CHUNK // averaged)):
        part = processor.prepare_video(chunk, pooled_video_grid_size, averaged)
        pixels, sizes = part.pixels[None].to(model.device), torch.tensor([part.size])
        (tokens,) = model.model.get_video_features(pixels, sizes, return_dict=True).pooler_output
        if features and model.config.video_newline:
            features[-1] = features[-1][:-1]  # the newline is behind the whole video
        features.append(tokens)
        seconds += part.seconds
    size = [len(seconds), *part.size[1:]]
    return PreparedVideo(size, part.frame_size, seconds, features=torch.cat(features))
