# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What images and videos take in the language model: tokens and positions, computed from their sizes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import DecoProcessor, num_image_tokens
from ..views import TokenMap, num_map_tokens
from .data.images import image_size


class Cost(NamedTuple):
    """The tokens of an image, a video or a part of it, and the positions that it takes if they keep their places."""

    num_tokens: int
    num_positions: int


@dataclass
class LargestCosts:
    """The costs of images and videos at the largest of the grids that the steps of a run may use.

    Args:
        processor: of the model.
        grid: the largest grid of an image or of its views. Default: the processor's.
        max_image_tokens: the largest budget of an image, if steps may use budgets in place of grids.
        video_grid: the largest grid of a frame. Default: the processor's.
        patches_per_image: the most patches of an image of one view.
    """

    processor: DecoProcessor
    grid: int | list[int] | None = None
    max_image_tokens: int | None = None
    video_grid: int | list[int] | None = None
    patches_per_image: int = 0

    @property
    def has_views(self) -> bool:
        """Whether the tokens of an image depend on its size."""
        return self.processor.has_views

    def of_images(self, images: list[Any]) -> list[Cost]:
        """The cost of each image of a sample. Of images that are not opened, only the size is read."""
        return self.of_sizes([image_size(image) if self.has_views else (0, 0) for image in images])

    def of_sizes(self, sizes: list[tuple[int, int]]) -> list[Cost]:
        """The cost of each image of a sample. The sizes, `(height, width)`, are those of images with views."""
        if not self.has_views:
            largest = num_image_tokens(self.grid or self.processor.pooled_grid_size)
            num_tokens = max(largest, self.max_image_tokens or 0)
            return [Cost(num_tokens, max(num_tokens, self.patches_per_image))] * len(sizes)
        inputs = self.processor.blank_inputs(sizes, {})
        if tiles_single_images(self.processor):
            inputs["batch_num_images"] = [len(sizes)]
        costs = [list(map(_cost, self.processor.image_maps(inputs, self.grid)))]
        if self.max_image_tokens is not None:
            costs.append(list(map(_cost, self.processor.image_maps(inputs, None, self.max_image_tokens))))
        return list(map(max, *costs)) if len(costs) > 1 else costs[0]

    def of_video(self, num_frames: int) -> list[Cost]:
        """The cost of each grid of a video's tokens."""
        frame_size = self.processor.frame_size
        size = self.processor.video_size(num_frames, frame_size, self.video_grid)
        return [_cost([token_map]) for token_map in self.processor.video_maps(size, frame_size)]


def tiles_single_images(processor: DecoProcessor) -> bool:
    """Whether an image is cut into tiles only where it is the one image of its sample (OneVision)."""
    return "batch_num_images" in processor.image_processor.model_input_names


def _cost(maps: list[TokenMap]) -> Cost:
    return Cost(num_map_tokens(maps), sum(token_map.span for token_map in maps))
