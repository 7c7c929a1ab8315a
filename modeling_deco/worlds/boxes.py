# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Overlap of boxes."""

import torch


def box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each box `(..., 4)` with the other box at the same position; 0 for empty boxes."""
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    intersection = sides.clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    other_area = (others[..., 2:] - others[..., :2]).clamp(min=0).prod(-1)
    return intersection / (area + other_area - intersection).clamp(min=1e-6)
