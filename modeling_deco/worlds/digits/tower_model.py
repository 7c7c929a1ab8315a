# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The vision tower of the digits world: a CLIP of 0.84 M parameters."""

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from .scenes import IMAGE_SIZE, Scene

PATCH_SIZE = 8
PATCH_GRID = IMAGE_SIZE // PATCH_SIZE
# Pictures are dark: these values bring the background to about -0.6 and ink to about 2.
IMAGE_MEAN = IMAGE_STD = (0.25, 0.25, 0.25)


def sincos_positions(grid_size: int, hidden_size: int) -> torch.Tensor:
    """Fixed 2D sine-cosine positions `(grid_size ** 2, hidden_size)`: half the channels for rows, half for columns."""
    frequencies = 1 / 100 ** (torch.arange(hidden_size // 4) / (hidden_size // 4))
    angles = torch.arange(grid_size)[:, None] * frequencies  # (grid, hidden / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, hidden / 2)
    rows = line[:, None].expand(-1, grid_size, -1)
    columns = line[None].expand(grid_size, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def build_tower() -> CLIPVisionModel:
    """An untrained CLIP vision tower for pictures of 96 x 96 pixels in patches of 8 x 8."""
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    tower = CLIPVisionModel(config)
    embeddings = tower.embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[1:] = sincos_positions(PATCH_GRID, config.hidden_size)
        # CLIP's default of 0.02 would drown the pixels in the positions.
        nn.init.normal_(embeddings.patch_embedding.weight, std=embeddings.patch_embedding.weight[0].numel() ** -0.5)
    return tower


def patch_features(tower: CLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What DeCo pools, `(pictures, 144, hidden_size)`: the output of the last layer before the norm, without CLS."""
    return tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]


def pixel_values(scene: Scene) -> torch.Tensor:
    """The tower's input `(3, 96, 96)` for a scene, equal to the output of the checkpoint's image processor."""
    pixels = torch.frombuffer(bytearray(scene.image.tobytes()), dtype=torch.uint8).view(IMAGE_SIZE, IMAGE_SIZE, 3)
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return ((pixels / 255 - mean) / std).permute(2, 0, 1)
