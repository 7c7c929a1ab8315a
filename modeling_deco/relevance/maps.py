# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""From the tokens of an image to the patches of the whole picture, as matrices.

The language model reads a picture of high resolution as an overview and a stitched map (see `views.py`). Both become
one map over the patches of the stitched map, which has the higher resolution.
"""

import torch
from torch import nn

from ..projectors import pool_patch_grid
from ..views import Grid, TokenMap


def token_matrix(token_map: TokenMap) -> torch.Tensor:
    """Share of each patch in each token that is not a newline, `(rows * cols, num_patches)`. Rows sum to 1.

    It is exact, whether patches are pooled before the projector or interpolated behind it: both are linear, and the
    MLP works on each token by itself.
    """
    sides = zip(token_map.patch_grid, token_map.pooled_grid, strict=True)
    rows, cols = (_shrink(num_patches, size, token_map.is_interpolated) for num_patches, size in sides)
    return torch.kron(rows, cols)


def _shrink(num_patches: int, size: int, is_interpolated: bool) -> torch.Tensor:
    """Share of each of a line's patches in each of its tokens, `(size, num_patches)`."""
    identity = torch.eye(num_patches)
    if is_interpolated:
        return nn.functional.interpolate(identity[None], size, mode="linear")[0].T.contiguous()
    return pool_patch_grid(identity[None], (num_patches, 1), (size, 1))[0]


def view_patches(token_map: TokenMap, view_grid: Grid) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The view of each patch of a stitched map, and the patch's index in that view, both `(rows, cols)`.

    Args:
        view_grid: `(rows, cols)` of a view's patches.
    """
    (rows, cols), (top, left), (view_rows, view_cols) = token_map.patch_grid, token_map.padding, view_grid
    row, col = top + torch.arange(rows)[:, None], left + torch.arange(cols)
    view = row // view_rows * token_map.tile_grid[1] + col // view_cols
    return view, row % view_rows * view_cols + col % view_cols


def without_newlines(tokens: torch.Tensor, token_map: TokenMap) -> torch.Tensor:
    """Those of a map's tokens that stand for patches, row by row.

    Args:
        tokens: one entry for each token, `(num_tokens, ...)`.
    """
    rows, cols = token_map.pooled_grid
    if token_map.newline == "rows":
        return tokens.unflatten(0, (rows, cols + 1))[:, :-1].flatten(0, 1)
    return tokens[: rows * cols]


def join_maps(query_to_patch: list[torch.Tensor], token_maps: list[TokenMap]) -> torch.Tensor:
    """One map over the picture from those of its maps: `(num_queries, num_patches)` of the last map's patches."""
    grid = token_maps[-1].patch_grid
    return torch.cat(
        [
            rows if token_map.patch_grid == grid else rows @ spread(token_map.patch_grid, grid)
            for rows, token_map in zip(query_to_patch, token_maps, strict=True)
        ]
    )


def spread(grid: Grid, to: Grid) -> torch.Tensor:
    """How a map over a picture is resized to another grid, `(rows * cols, to_rows * to_cols)`.

    Each cell gives its relevance to the cells that cover the same area of the picture, in proportion to what they
    cover. Rows sum to 1, so the sum of relevance is kept.
    """
    rows, cols = (_overlaps(*sides) for sides in zip(grid, to, strict=True))
    return torch.kron(rows, cols)


def _overlaps(num_cells: int, num_other: int) -> torch.Tensor:
    """Share of each of a line's equal parts that lies in each of its other parts, `(num_cells, num_other)`."""
    start, other = torch.arange(num_cells)[:, None] * num_other, torch.arange(num_other) * num_cells
    overlap = torch.minimum(start + num_other, other + num_cells) - torch.maximum(start, other)
    return overlap.clamp(min=0) / num_other
