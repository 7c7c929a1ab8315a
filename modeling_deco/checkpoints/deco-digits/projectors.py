# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The projector of DeCo: pool the patch grid without parameters, then LLaVA's MLP.

It needs nothing else of this package's models and can be taken alone:

    projector = AvgPoolProjector(vision_hidden_size=1024, text_hidden_size=4096, pooled_grid_size=12)
    image_features = projector(patch_features)  # (num_images, 576, 1024) -> (num_images, 144, 4096)
"""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_deco import parse_grid


def pool_patch_grid(
    patch_features: torch.Tensor, patch_grid: tuple[int, int], pooled_grid: tuple[int, int]
) -> torch.Tensor:
    """Shrink the patch grid by 2D adaptive average pooling (arXiv 2405.20985): no parameters, no abstraction.

    Args:
        patch_features: `(num_images, patch_rows * patch_cols, vision_hidden_size)`, row by row.
        patch_grid: `(patch_rows, patch_cols)`.
        pooled_grid: `(rows, cols)`, at most the patch grid. Windows overlap where sizes do not divide.

    Returns:
        `(num_images, rows * cols, vision_hidden_size)`, contiguous; the input itself at the patch grid.

    Raises:
        ValueError: the tokens do not fill the patch grid, or the pooled grid is larger than it.
    """
    (patch_rows, patch_cols), (rows, cols) = patch_grid, pooled_grid
    if patch_features.shape[1] != patch_rows * patch_cols:
        raise ValueError(
            f"{patch_features.shape[1]} patch features do not fill a grid of {patch_rows} x {patch_cols} = "
            f"{patch_rows * patch_cols} patches."
        )
    if rows > patch_rows or cols > patch_cols:
        raise ValueError(
            f"A pooled grid of {rows} x {cols} is larger than the image's {patch_rows} x {patch_cols} patches; "
            f"choose a pooled_grid_size of at most that."
        )
    if (rows, cols) == (patch_rows, patch_cols):
        return patch_features
    feature_map = patch_features.transpose(1, 2).unflatten(2, patch_grid)  # (images, hidden, patch_rows, patch_cols)
    pooled_map = nn.functional.adaptive_avg_pool2d(feature_map, pooled_grid)  # (images, hidden, rows, cols)
    return pooled_map.flatten(2).transpose(1, 2).contiguous()  # (images, rows * cols, hidden)


class AvgPoolProjector(nn.Module):
    """DeCo's projector: `pool_patch_grid`, then `linear_1 ... linear_n` with an activation between (the authors' name
    for it, and LLaVA's names for the layers).

    Args:
        vision_hidden_size: width of the patch features.
        text_hidden_size: width of the language model.
        pooled_grid_size: default grid, an int (square) or `(rows, cols)`.
        num_layers: linear layers.
        hidden_act: a key of transformers' `ACT2FN`.
        bias: whether the linear layers have biases.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        pooled_grid_size: int | tuple[int, int] = 12,
        num_layers: int = 2,
        hidden_act: str = "gelu",
        bias: bool = True,
    ):
        super().__init__()
        self.pooled_grid = parse_grid(pooled_grid_size)
        self.num_layers = num_layers
        self.act = ACT2FN[hidden_act]
        for index in range(num_layers):
            in_features = vision_hidden_size if index == 0 else text_hidden_size
            self.add_module(f"linear_{index + 1}", nn.Linear(in_features, text_hidden_size, bias=bias))

    def forward(
        self,
        patch_features: torch.Tensor,
        patch_grid: tuple[int, int] | None = None,
        pooled_grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Pool and project the patches of images that share one patch grid and one pooled grid.

        Args:
            patch_features: `(num_images, patch_rows * patch_cols, vision_hidden_size)` without prefix tokens.
            patch_grid: `(patch_rows, patch_cols)`; may be left out where it is square.
            pooled_grid: `(rows, cols)`; default: the module's.

        Returns:
            `(num_images, rows * cols, text_hidden_size)`.

        Raises:
            ValueError: the patch grid is not given and not square, or `pool_patch_grid` refuses the grids.
        """
        if patch_grid is None:
            side = math.isqrt(patch_features.shape[1])
            if side * side != patch_features.shape[1]:
                raise ValueError(f"{patch_features.shape[1]} patches are not square; pass patch_grid=(rows, cols).")
            patch_grid = (side, side)
        hidden_states = pool_patch_grid(patch_features, patch_grid, pooled_grid or self.pooled_grid)
        for index in range(self.num_layers):
            if index > 0:
                hidden_states = self.act(hidden_states)
            hidden_states = self.get_submodule(f"linear_{index + 1}")(hidden_states)
        return hidden_states


__all__ = ["AvgPoolProjector", "pool_patch_grid"]
