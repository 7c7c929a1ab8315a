# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Heads on the vision tower: their losses train it, and their accuracy forecasts what DeCo can answer."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPVisionModel

from ..boxes import box_iou
from .scenes import IMAGE_SIZE
from .tower_labels import BACKGROUND, IGNORE, NUM_CLASSES, NUM_COLOURS, cell_presence, patch_digits
from .tower_model import PATCH_GRID, patch_features

POOLED_GRIDS = (3, 4, 6)
BOX_SCALE = IMAGE_SIZE / 4  # box losses are in units of 4 pixels, as the answers are


class DenseHeads(nn.Module):
    """Predict digits, colours and boxes from patches and from pooled patches. DeCo does not use them."""

    def __init__(self, hidden_size: int = 128, pooled_hidden_size: int = 384):
        super().__init__()
        self.patch = nn.Linear(hidden_size, NUM_CLASSES + 1 + NUM_COLOURS + 4)
        self.pooled = nn.Sequential(
            nn.Linear(hidden_size, pooled_hidden_size),
            nn.GELU(),
            nn.Linear(pooled_hidden_size, NUM_CLASSES * (1 + NUM_COLOURS + 4)),
        )

    def read_patches(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of digit or background `(..., 11)`, logits of colour `(..., 6)`, and boxes `(..., 4)` from 0 to 1."""
        return self.patch(features).float().split([NUM_CLASSES + 1, NUM_COLOURS, 4], dim=-1)

    def read_pooled(self, features: torch.Tensor, grid: int) -> tuple[torch.Tensor, ...]:
        """Logits of presence `(pictures, cells, 10)`, logits of colour `(..., 10, 6)`, and boxes `(..., 10, 4)`."""
        patch_grid = features.transpose(1, 2).unflatten(-1, (PATCH_GRID, PATCH_GRID))
        pooled_grid = F.adaptive_avg_pool2d(patch_grid, grid)
        slots = self.pooled(pooled_grid.flatten(2).transpose(1, 2)).float().unflatten(-1, (NUM_CLASSES, -1))
        presence, colours, boxes = slots.split([1, NUM_COLOURS, 4], dim=-1)
        return presence.squeeze(-1), colours, boxes

    def loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor], pooled: bool = True) -> torch.Tensor:
        """Sum of the losses for the `patch_features` of a batch and its `scene_labels`."""
        grids = POOLED_GRIDS if pooled else ()
        return self._patch_loss(features, labels) + sum(self._pooled_loss(features, labels, grid) for grid in grids)

    def _patch_loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        digit_logits, colour_logits, boxes = self.read_patches(features)
        digits = patch_digits(labels["boxes"])
        picture, patch = torch.nonzero((digits >= 0) & (digits != BACKGROUND), as_tuple=True)
        value = digits[picture, patch]
        return (
            F.cross_entropy(digit_logits.flatten(0, 1), digits.flatten(), ignore_index=IGNORE)
            + F.cross_entropy(colour_logits[picture, patch], labels["colours"][picture, value])
            + _box_loss(boxes[picture, patch], labels["boxes"][picture, value])
        )

    def _pooled_loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor], grid: int) -> torch.Tensor:
        presence_logits, colour_logits, boxes = self.read_pooled(features, grid)
        present, known = cell_presence(labels["boxes"], grid)
        picture, cell, value = torch.nonzero(present, as_tuple=True)
        presence_loss = F.binary_cross_entropy_with_logits(presence_logits, present.float(), reduction="none")
        return (
            # divided by the positive slots, since nearly all slots are negative
            (presence_loss * known).sum() / present.sum()
            + F.cross_entropy(colour_logits[picture, cell, value], labels["colours"][picture, value])
            + _box_loss(boxes[picture, cell, value], labels["boxes"][picture, value])
        )


def _box_loss(predicted: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    return F.smooth_l1_loss(predicted * BOX_SCALE, boxes / IMAGE_SIZE * BOX_SCALE)


def read_scenes(
    heads: DenseHeads, features: torch.Tensor, grid: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Presence `(pictures, 10)`, colour `(pictures, 10)` and box of each class, from its most confident cell."""
    presence, colours, boxes = heads.read_pooled(features, grid)
    confidence, cell = presence.max(dim=1)
    colours = colours.argmax(-1).gather(1, cell[:, None]).squeeze(1)
    boxes = boxes.gather(1, cell[:, None, :, None].expand(-1, -1, -1, 4)).squeeze(1)
    return confidence > 0, colours, boxes * IMAGE_SIZE


@torch.no_grad()
def evaluate(
    tower: CLIPVisionModel, heads: DenseHeads, loader: DataLoader, bf16: bool = True, pooled: bool = True
) -> dict[str, float]:
    """Accuracies of the heads, in percent.

    `patch_digit` is the accuracy on patches that show a digit. For each grid, `read` is the share of pictures whose
    digits are found exactly and in the right order, `colour` the share of right colours, and `locate` the share of
    boxes with an IoU of at least 0.5.
    """
    device = next(tower.parameters()).device
    counts: dict[str, list[float]] = {}
    for batch in loader:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            features = patch_features(tower, batch["pixel_values"])
            digits, predicted = patch_digits(batch["boxes"]), heads.read_patches(features)[0].argmax(-1)
            on_digit = (digits >= 0) & (digits != BACKGROUND)
            counts.setdefault("patch_digit", []).extend((digits == predicted)[on_digit].tolist())
            for grid in POOLED_GRIDS if pooled else ():
                present, colours, boxes = read_scenes(heads, features, grid)
                truth = batch["colours"] >= 0
                order = _centers(boxes, truth).argsort(-1) == _centers(batch["boxes"], truth).argsort(-1)
                read = (present == truth).all(-1) & (order | (_centers(boxes, truth).sort(-1)[0] == math.inf)).all(-1)
                counts.setdefault(f"read_{grid}x{grid}", []).extend(read.tolist())
                counts.setdefault(f"colour_{grid}x{grid}", []).extend((colours == batch["colours"])[truth].tolist())
                iou = box_iou(boxes, batch["boxes"])[truth]
                counts.setdefault(f"locate_{grid}x{grid}", []).extend((iou >= 0.5).tolist())
    return {name: round(100 * sum(hits) / len(hits), 1) for name, hits in counts.items()}


def _centers(boxes: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return ((boxes[..., 0] + boxes[..., 2]) / 2).masked_fill(~present, math.inf)
