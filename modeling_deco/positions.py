# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Positions of tokens in the language model, where pooled tokens keep the places of their patches.

A language model that was trained on an image of 24 x 24 patches has learned what the 576 positions of the image mean,
and how far the text is from it. With `image_positions="patch"`, a pooled token has the position that the central patch
of its window has in the full grid, and the text behind the image goes on behind the span of all patches. At the full
grid this is the usual numbering, in which each token is one further than the last (`image_positions="sequence"`).
"""

from typing import Any

import torch
from torch import nn

Grid = tuple[int, int]


def image_offsets(patch_grid: Grid, pooled_grid: Grid, device: torch.device | str | None = None) -> torch.LongTensor:
    """Positions of an image's tokens, counted from the position of its first patch.

    Args:
        patch_grid: `(rows, cols)` of the patches.
        pooled_grid: `(rows, cols)` of the tokens, at most the patch grid.

    Returns:
        `(rows * cols,)`, row by row, strictly rising: the index in the patch grid of the central patch of each
        window. In each direction it is `(first + last) // 2` of the window of adaptive average pooling.
    """
    row, col = (_window_centers(*sides, device) for sides in zip(patch_grid, pooled_grid, strict=True))
    return (row[:, None] * patch_grid[1] + col).flatten()


def _window_centers(num_patches: int, num_windows: int, device) -> torch.LongTensor:
    window = torch.arange(num_windows, device=device)
    first = window * num_patches // num_windows
    last = ((window + 1) * num_patches - 1) // num_windows
    return (first + last) // 2


def patch_position_ids(
    is_image: torch.BoolTensor,
    patch_grids: Grid | list[Grid],
    pooled_grids: Grid | list[Grid],
    attention_mask: torch.Tensor | None = None,
) -> torch.LongTensor:
    """Position of each token, where images keep the places of their patches.

    A token of text takes one position. An image takes as many positions as it has patches, and its tokens have those
    of `image_offsets`. With one grid for all images the graph is static.

    Args:
        is_image: `(batch, sequence)`, true at image placeholders, with all placeholders of every image.
        patch_grids: `(rows, cols)` of all images' patches, or a list with one for each image, in the order of their
            placeholders.
        pooled_grids: `(rows, cols)` of all images' tokens, or a list if `patch_grids` is one.
        attention_mask: `(batch, sequence)`, 0 at padding, which takes no position and has position 0. Or `(batch, 1,
            sequence, sequence)`, true where a token attends to another or to itself: then a token's position counts
            only what it attends to. Default: no padding.

    Returns:
        `(batch, sequence)`.
    """
    device = is_image.device
    index = (is_image.flatten().cumsum(0) - 1).view(is_image.shape)  # which of all image tokens a token is
    if isinstance(patch_grids, tuple) and isinstance(pooled_grids, tuple):
        offsets = image_offsets(patch_grids, pooled_grids, device)
        steps = _steps(patch_grids, pooled_grids, device)
        index = index % len(offsets)
    else:
        images: list[tuple[Any, Any]] = list(zip(patch_grids, pooled_grids, strict=True))
        offsets = torch.cat([image_offsets(patches, pooled, device) for patches, pooled in images])
        steps = torch.cat([_steps(patches, pooled, device) for patches, pooled in images])
        index = index.clamp(0, len(offsets) - 1)  # the model refuses a wrong number of placeholders
    offset = torch.where(is_image, offsets[index], 0)
    step = torch.where(is_image, steps[index], 1)
    if attention_mask is not None and attention_mask.ndim == 4:
        attended = (attention_mask[:, 0].tril() * step[:, None]).sum(-1)
        return (attended - step + offset).clamp(min=0)
    if attention_mask is None:
        return step.cumsum(-1) - step + offset
    step = step * attention_mask.long()
    return (step.cumsum(-1) - step + offset).masked_fill(attention_mask == 0, 0)


def position_behind(
    is_image: torch.BoolTensor,
    patch_grids: Grid | list[Grid],
    pooled_grids: Grid | list[Grid],
    attention_mask: torch.Tensor | None = None,
) -> torch.LongTensor:
    """Position `(batch, 1)` of a token of text behind the last one of each row, which may be an image's: then it is
    behind all patches of the image. Arguments are those of `patch_position_ids`, with a mask of two dimensions."""
    is_image = nn.functional.pad(is_image, (0, 1))
    if attention_mask is not None:
        attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
    return patch_position_ids(is_image, patch_grids, pooled_grids, attention_mask)[:, -1:]


def _steps(patch_grid: Grid, pooled_grid: Grid, device) -> torch.LongTensor:
    """How far each token of an image moves the text behind it: the last one by the image's span, the others by 0."""
    steps = torch.zeros(pooled_grid[0] * pooled_grid[1], dtype=torch.long, device=device)
    steps[-1] = patch_grid[0] * patch_grid[1]
    return steps


# A cache is a list of keys, and does not know at which positions they were. Its length is the next position unless
# images kept their places; then the difference is kept with the cache.
_OFFSET = "next_position_offset"


def num_tokens(cache) -> int | torch.Tensor:
    """The number of tokens in a key-value cache: 0 without one, or if the cache does not count them."""
    try:
        return 0 if cache is None else cache.get_seq_length()
    except (AttributeError, ValueError):
        return 0


def has_moved(cache) -> bool:
    """Whether `set_next_position` was called for the tokens in a cache. A cache that was reset has none."""
    return getattr(cache, _OFFSET, None) is not None and bool(num_tokens(cache) > 0)


def next_position(cache) -> int | torch.Tensor:
    """The position behind the tokens of a key-value cache, `(batch, 1)` if `set_next_position` was called for it."""
    length = num_tokens(cache)
    return length + getattr(cache, _OFFSET) if has_moved(cache) else length


def set_next_position(cache, position: torch.Tensor, length: int | torch.Tensor) -> None:
    """Note in a key-value cache at which position its next token is.

    Args:
        position: `(batch, 1)`.
        length: the number of tokens in the cache.
    """
    if cache is not None:
        setattr(cache, _OFFSET, position - length)
