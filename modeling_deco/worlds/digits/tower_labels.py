# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense labels for the vision tower: the digit, colour and box at each patch and at each cell of pooled patches."""

import torch
from torch.utils.data import Dataset

from .scenes import COLOURS, IMAGE_SIZE, Scene, render
from .tower_model import PATCH_GRID, PATCH_SIZE, pixel_values

COLOUR_NAMES = tuple(COLOURS)
NUM_CLASSES, NUM_COLOURS = 10, len(COLOUR_NAMES)
BACKGROUND, IGNORE = NUM_CLASSES, -100


def scene_labels(scene: Scene) -> dict[str, torch.Tensor]:
    """The content of a scene by class: `boxes` `(10, 4)` in pixels, zero for absent digits, and `colours` `(10,)`."""
    boxes, colours = torch.zeros(NUM_CLASSES, 4), torch.full((NUM_CLASSES,), IGNORE)
    for digit in scene.digits:
        boxes[digit.value] = torch.tensor(digit.box, dtype=torch.float)
        colours[digit.value] = COLOUR_NAMES.index(digit.colour)
    return {"boxes": boxes, "colours": colours}


def _covered_area(boxes: torch.Tensor, grid: int) -> torch.Tensor:
    """Number of pixels of each grid cell that each box covers: `(pictures, cells, classes)`."""
    edges = torch.linspace(0, IMAGE_SIZE, grid + 1, device=boxes.device)
    low, high = boxes[..., None, :2], boxes[..., None, 2:]
    covered = torch.minimum(high, edges[1:, None]) - torch.maximum(low, edges[:-1, None])
    columns, rows = covered.clamp(min=0).unbind(-1)  # each (pictures, classes, grid)
    return (rows[..., :, None] * columns[..., None, :]).flatten(2).transpose(1, 2)


def patch_digits(boxes: torch.Tensor) -> torch.Tensor:
    """Class of each patch `(pictures, 144)`: a digit, `BACKGROUND`, or `IGNORE` if less than a quarter is covered."""
    area, digits = _covered_area(boxes, PATCH_GRID).max(dim=-1)
    digits = digits.masked_fill(area < PATCH_SIZE**2 / 4, IGNORE)
    return digits.masked_fill(area == 0, BACKGROUND)


def cell_presence(boxes: torch.Tensor, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which digits each pooled cell should report, and which of these labels are defined.

    A cell should report a digit if it holds at least a sixth of its box, or the largest share of all cells. For a
    smaller share the label is undefined.

    Returns:
        Two masks `(pictures, cells, 10)`.
    """
    area = _covered_area(boxes, grid)
    share = area / area.sum(dim=1, keepdim=True).clamp(min=1)
    present = (share > 0) & ((share >= 1 / 6) | (share == share.amax(dim=1, keepdim=True)))
    return present, present | (share == 0)


class LabelledScenes(Dataset):
    """Scenes `start` to `stop` of a split, with the labels that `DenseHeads` needs."""

    def __init__(self, split: str, start: int, stop: int, seed: int = 0, min_digits: int = 2, max_digits: int = 4):
        self.indices = range(start, stop)
        self.split = split
        self.numbers = {"seed": seed, "min_digits": min_digits, "max_digits": max_digits}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        scene = render(self.split, self.indices[position], **self.numbers)
        return {"pixel_values": pixel_values(scene).contiguous(), **scene_labels(scene)}
