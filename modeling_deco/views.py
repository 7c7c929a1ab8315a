# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Views of a picture or of a video, and the maps of tokens that they become.

A picture of high resolution is cut into views of the vision tower's size: tiles, and often an overview of the whole
picture (LLaVA-NeXT, LLaVA-OneVision). However many tiles there are, their patches are one map: tiles are stitched in
patch space, padding is cut off, and the map is pooled. A video is a sequence of frames with a map each, or a map for
several neighbouring frames, which are averaged.

The language model reads an image as the tokens of its maps, one map after the other, row by row. A learned newline may
end each row. `TokenMap` describes a map, `Views` makes the maps of pictures and videos, and every count and position
of tokens is computed from them.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

Grid = tuple[int, int]


class TokenMap(NamedTuple):
    """A map of patches, and the tokens that it becomes.

    Attributes:
        patch_grid: `(rows, cols)` of the patches, without padding.
        full_grid: `(rows, cols)` of the tokens at the full budget, which positions refer to. It is the patch grid,
            unless the model sees fewer tokens even then (OneVision's cap, its videos, tiles of a model for one view).
        pooled_grid: `(rows, cols)` of the tokens, at most the full grid.
        newline: `"rows"`: the newline ends each row. `"end"`: it is behind the last row. `"none"`: there is none.
        is_interpolated: whether projected patches are interpolated to the tokens. Otherwise patches are pooled, and
            then projected.
        tile_grid: `(rows, cols)` of the views that are stitched to the map.
        padding: `(rows, cols)` of patches to cut off above and to the left.
        num_frames: frames that are averaged.
    """

    patch_grid: Grid
    full_grid: Grid
    pooled_grid: Grid
    newline: str = "none"
    is_interpolated: bool = False
    tile_grid: Grid = (1, 1)
    padding: Grid = (0, 0)
    num_frames: int = 1

    @property
    def num_views(self) -> int:
        """Views of the vision tower that the map is made of."""
        return self.tile_grid[0] * self.tile_grid[1] * self.num_frames

    @property
    def num_pooled(self) -> int:
        """Vectors that the projector gets of the map."""
        as_patches = self.is_interpolated or 0 in self.pooled_grid
        rows, cols = self.patch_grid if as_patches else self.pooled_grid
        return rows * cols

    @property
    def num_tokens(self) -> int:
        """Tokens in the language model, newlines included."""
        return self._count(self.pooled_grid)

    @property
    def span(self) -> int:
        """Tokens at the full grid, newlines included: positions that the map takes if tokens keep their places."""
        return self._count(self.full_grid)

    def _count(self, grid: Grid) -> int:
        rows, cols = grid
        return rows * cols + {"none": 0, "rows": rows, "end": 1}[self.newline]


def num_map_tokens(maps: list[TokenMap]) -> int:
    """Tokens of an image or video in the language model."""
    return sum(token_map.num_tokens for token_map in maps)


def num_map_views(maps: list[TokenMap]) -> int:
    """Views of the vision tower that an image or video consists of."""
    return sum(token_map.num_views for token_map in maps)


def tiled_images(num_images: int, batch_num_images: Iterable[int] | None = None) -> list[bool]:
    """Whether each image is cut into tiles. In LLaVA-OneVision, only the image of a sample with one is.

    Args:
        batch_num_images: the images of each sample. None: all images are tiled.
    """
    if batch_num_images is None:
        return [True] * num_images
    return [int(number) == 1 for number in batch_num_images for _ in range(int(number))]


def one_map(patch_grid: Grid, pooled_grid: Grid) -> list[TokenMap]:
    """The maps of an image of one view."""
    return [TokenMap(patch_grid, patch_grid, pooled_grid)]


@dataclass(frozen=True)
class Views:
    """How pictures and videos become maps of tokens. The fields are those of `DecoConfig`, where they are explained.

    Args:
        view_size: `(height, width)` of a view in pixels.
        view_grid: `(rows, cols)` of a view's patches.
    """

    view_size: Grid
    view_grid: Grid
    image_grid_pinpoints: list[list[int]] | None = None
    image_overview: bool = True
    image_newline: bool = False
    vision_aspect_ratio: str = "anyres"
    spatial_pool_mode: str = "average"
    spatial_pool_stride: int = 1
    video_newline: bool = False

    @property
    def full_video_grid(self) -> Grid:
        """`(rows, cols)` of a frame's tokens at the full grid."""
        rows, cols = self.view_grid
        return math.ceil(rows / self.spatial_pool_stride), math.ceil(cols / self.spatial_pool_stride)

    def image_maps(self, image_size: Grid, pooled_grid: Grid, is_tiled: bool = True) -> list[TokenMap]:
        """The maps of a picture.

        Args:
            image_size: `(height, width)` of the picture in pixels. Without pinpoints, it is the size of the tiles
                together, which are pooled to one grid as a whole.
            pooled_grid: `(rows, cols)` of a view. The stitched map is pooled by the same factor.
            is_tiled: whether the picture is cut into tiles.
        """
        if self.image_grid_pinpoints is None:
            tile_grid = image_size[0] // self.view_size[0], image_size[1] // self.view_size[1]
            patch_grid = tile_grid[0] * self.view_grid[0], tile_grid[1] * self.view_grid[1]
            full_grid = max(self.view_grid[0], pooled_grid[0]), max(self.view_grid[1], pooled_grid[1])
            return [TokenMap(patch_grid, full_grid, pooled_grid, tile_grid=tile_grid)]
        one_view = TokenMap(self.view_grid, self.view_grid, pooled_grid)
        if not is_tiled:
            return [one_view._replace(newline="end" if self.image_newline else "none")]
        stitched = self._stitched_map(image_size, pooled_grid)
        return [one_view, stitched] if self.image_overview else [stitched]

    def _stitched_map(self, image_size: Grid, pooled_grid: Grid) -> TokenMap:
        tile_grid = self.tile_grid(image_size)
        padded = tile_grid[0] * self.view_grid[0], tile_grid[1] * self.view_grid[1]
        patch_grid, padding = _without_padding(padded, image_size, least=0 if self.image_overview else 1)
        full_grid = self._capped(patch_grid)
        at_full = pooled_grid == self.view_grid
        return TokenMap(
            patch_grid,
            full_grid,
            full_grid if at_full else _scaled(full_grid, pooled_grid, self.view_grid),
            newline="rows" if self.image_newline else "none",
            is_interpolated=at_full and full_grid != patch_grid,
            tile_grid=tile_grid,
            padding=padding,
        )

    def tile_grid(self, image_size: Grid) -> Grid:
        """`(rows, cols)` of a picture's tiles: the best of the pinpoints for the picture's size."""
        # imported here to avoid a circle: its module imports the one that registers DecoConfig
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(image_size, self.image_grid_pinpoints)
        return height // self.view_size[0], width // self.view_size[1]

    def _capped(self, patch_grid: Grid) -> Grid:
        """OneVision's cap: a map of more than `anyres_max_N` views is shrunk (modeling_llava_onevision.py,
        `pack_image_features`, transformers 5.24)."""
        max_views = parse_aspect_ratio(self.vision_aspect_ratio)
        if max_views is None:
            return patch_grid
        rows, cols = patch_grid
        ratio = math.sqrt(rows * cols / (max_views * self.view_grid[0] * self.view_grid[1]))
        return (max(1, int(rows // ratio)), max(1, int(cols // ratio))) if ratio > 1.1 else patch_grid

    def video_maps(self, num_frames: int, frames_per_token_grid: int, pooled_grid: Grid) -> list[TokenMap]:
        """The maps of a video.

        Args:
            num_frames: frames of the video.
            frames_per_token_grid: neighbouring frames that are averaged. The last ones may be fewer.
            pooled_grid: `(rows, cols)` of a frame's tokens.
        """
        full_rows, full_cols = self.full_video_grid
        full_grid = max(full_rows, pooled_grid[0]), max(full_cols, pooled_grid[1])
        is_full = pooled_grid == self.full_video_grid != self.view_grid
        token_map = TokenMap(
            self.view_grid, full_grid, pooled_grid, is_interpolated=is_full and self.spatial_pool_mode == "bilinear"
        )
        maps = [
            token_map._replace(num_frames=min(frames_per_token_grid, num_frames - first))
            for first in range(0, num_frames, frames_per_token_grid)
        ]
        if self.video_newline and maps:
            maps[-1] = maps[-1]._replace(newline="end")
        return maps


def parse_aspect_ratio(vision_aspect_ratio: str) -> int | None:
    """The cap `N` of `"anyres_max_N"`, None for `"anyres"`.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"anyres(?:_max_([1-9]\d{0,5}))?", vision_aspect_ratio)
    if match is None:
        raise ValueError(
            f"vision_aspect_ratio must be 'anyres' or 'anyres_max_N' with a number N, got {vision_aspect_ratio!r}."
        )
    return None if match[1] is None else int(match[1])


def _without_padding(padded: Grid, image_size: Grid, least: int) -> tuple[Grid, Grid]:
    """The patches of a picture in a padded map, and the patches of padding above and to the left (`unpad_image` in
    modeling_llava_next.py, transformers 5.24). A very thin picture may have none, unless it gets at least `least` rows
    or columns."""
    (rows, cols), (height, width) = padded, image_size
    if width / height > cols / rows:
        content = max(least, int(round(height * (cols / width), 7)))
        top = (rows - content) // 2
        return (rows - 2 * top, cols), (top, 0)
    content = max(least, int(round(width * (rows / height), 7)))
    left = (cols - content) // 2
    return (rows, cols - 2 * left), (0, left)


def _scaled(grid: Grid, pooled_grid: Grid, view_grid: Grid) -> Grid:
    """A grid shrunk by the factor of a view, rounded up."""
    rows, cols = (
        -(-side * pooled // patches) for side, pooled, patches in zip(grid, pooled_grid, view_grid, strict=True)
    )
    return rows, cols


def largest_grid(patch_grid: Grid, max_tokens: int, count: Callable[[Grid], int]) -> Grid:
    """The largest grid of a view with which an image has at most `max_tokens` tokens.

    Args:
        patch_grid: `(rows, cols)` of the patches, whose aspect the grid keeps.
        count: gives the tokens of the image at a grid.

    Raises:
        ValueError: not even the smallest grid fits.
    """
    longest = max(patch_grid)
    for side in range(longest, 0, -1):
        rows, cols = _scaled(patch_grid, (side, side), (longest, longest))
        if count((rows, cols)) <= max_tokens:
            return rows, cols
    raise ValueError(
        f"max_image_tokens={max_tokens} is less than the {count((1, 1))} tokens that the image takes at the grid 1 x "
        f"1; choose at least {count((1, 1))}."
    )
