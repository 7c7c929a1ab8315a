# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The options of a server."""

from dataclasses import dataclass

from ..inference.limits import UNTRUSTED_LIMITS, UNTRUSTED_VIDEO_LIMITS, ImageLimits


@dataclass(frozen=True)
class ServerOptions:
    """The limits of a server, and its defaults for fields that a request leaves out.

    Attributes:
        api_key: the key that clients must send as `Authorization: Bearer KEY`. `/health` needs no key.
        allow_files: whether an image URL may name a file of this machine.
        allow_private: whether an image URL may lead to an address that is not public.
        pooled_grid_size: token budget of each image: an int (square) or `[rows, cols]`. Default: the checkpoint's.
        max_image_tokens, tiles: as in `DecoProcessor.__call__`.
        temperature: 0 is greedy decoding. Default: the checkpoint's.
        seed: seed of sampling. Default: a new one for each request.
        system: system message of conversations that have none.
        max_new_tokens: maximum length of an answer, and the default for requests that do not set one.
        max_queue: number of requests that may wait while one is answered, and of requests whose images may be read at
            the same time. Further requests get status 429.
        max_images: maximum number of images in a request.
        image_limits: limits of each image. `max_pixels` also limits all images of a request together.
        max_tiles: maximum number of tiles that the `tiles` of a request cuts its images into, all together.
        max_videos: maximum number of videos in a request.
        max_frames: maximum number of frames of a video, and the default. Default: the checkpoint's default.
        video_limits: limits of each video. `max_pixels` are those of a frame, and the times are for all frames.
        max_video_requests: number of requests with videos that may be read or wait. Further ones get status 429.
        max_body_bytes: maximum size of a request.
        max_connections: maximum number of open connections. A new connection beyond it closes the one that has kept
            the server waiting for the longest time. Default: half of the files that this process may open, at most
            1000.
        header_timeout: seconds that a connection may take to send the headers of its next request.
        body_timeout: seconds that a client may take to send the rest of a request, or to read what was sent to it.
        prompt_cache_bytes: size of the cache of keys and values of earlier prompts and answers; see `PromptCache`.
    """

    api_key: str | None = None
    allow_files: bool = False
    allow_private: bool = False
    pooled_grid_size: int | list[int] | None = None
    max_image_tokens: int | None = None
    tiles: int | None = None
    temperature: float | None = None
    seed: int | None = None
    system: str | None = None
    max_new_tokens: int = 1024
    max_queue: int = 32
    max_images: int = 8
    image_limits: ImageLimits = UNTRUSTED_LIMITS
    max_tiles: int = 64
    max_videos: int = 2
    max_frames: int | None = None
    video_limits: ImageLimits = UNTRUSTED_VIDEO_LIMITS
    max_video_requests: int = 4
    max_body_bytes: int = 32 * 2**20
    max_connections: int | None = None
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    prompt_cache_bytes: int = 2**30

    @property
    def budgets(self) -> dict:
        """The token budgets of images that are set."""
        names = ("pooled_grid_size", "max_image_tokens", "tiles")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
