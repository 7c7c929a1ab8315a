# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Positions of tokens in the language model, where pooled tokens keep the places of their patches.

A language model that was trained on an image of 24 x 24 patches has learned what the 576 positions of the image mean,
and how far the text is from it. With `image_positions="patch"`, a pooled token has the position that the central patch
of its window has in the full grid, and the text behind the image goes on behind the span of all patches. At the full
grid this is the usual numbering, in which each token is one further than the last (`image_positions="sequence"`).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from .views import Grid, TokenMap, one_map


def image_offsets(patch_grid: Grid, pooled_grid: Grid, device: torch.device | str | None = None) -> torch.LongTensor:
    """Positions of an image's tokens, counted from the position of its first patch.

    Args:
        patch_grid: `(rows, cols)` of the patches.
        pooled_grid: `(rows, cols)` of the tokens, at most the patch grid.

    Returns:
        `(rows * cols,)`, row by row, strictly rising: the index in the patch grid of the central patch of each
        window. In each direction it is `(first + last) // 2` of the window of adaptive average pooling.
    """
    return map_offsets(one_map(patch_grid, pooled_grid)[0], device)


def map_offsets(token_map: TokenMap, device: torch.device | str | None = None) -> torch.LongTensor:
    """Positions `(num_tokens,)` of a map's tokens, counted from its first position: where the central token of each
    window is at the full grid. A newline has the position of that of its window's central row."""
    rows, cols = token_map.full_grid
    row, col = (
        _window_centers(*sides, device) for sides in zip(token_map.full_grid, token_map.pooled_grid, strict=True)
    )
    if token_map.newline == "rows":
        col = torch.cat([col, col.new_tensor([cols])])
        cols += 1
    offsets = (row[:, None] * cols + col).flatten()
    return torch.cat([offsets, offsets.new_tensor([rows * cols])]) if token_map.newline == "end" else offsets


def _window_centers(num_patches: int, num_windows: int, device) -> torch.LongTensor:
    window = torch.arange(num_windows, device=device)
    first = window * num_patches // num_windows
    last = ((window + 1) * num_patches - 1) // num_windows
    return (first + last) // 2


class Places(NamedTuple):
    """Placeholders of images or of videos, and the places of their tokens.

    Attributes:
        mask: `(batch, sequence)`, true at the placeholders.
        offsets: `(num_tokens,)`, positions of the tokens, counted from that of the first token of their map. Those of
            one image serve for several that are alike.
        steps: `(num_tokens,)`, how far each token moves what is behind it: the last one of a map by its span, the
            others by 0.
    """

    mask: torch.BoolTensor
    offsets: torch.LongTensor
    steps: torch.LongTensor


def places(mask: torch.BoolTensor, maps: Iterable[TokenMap]) -> Places:
    """The places of the tokens of maps, which fill the placeholders of a mask in their order."""
    device, known = mask.device, {}
    offsets, steps = [mask.new_zeros(0, dtype=torch.long)], [mask.new_zeros(0, dtype=torch.long)]
    for token_map in maps:
        if token_map.num_tokens == 0:  # of a very thin picture
            continue
        if token_map not in known:
            step = torch.zeros(token_map.num_tokens, dtype=torch.long, device=device)
            step[-1] = token_map.span
            known[token_map] = map_offsets(token_map, device), step
        for found, parts in zip(known[token_map], (offsets, steps), strict=True):
            parts.append(found)
    return Places(mask, torch.cat(offsets), torch.cat(steps))


def patch_position_ids(
    placeholders: Iterable[Places],
    attention_mask: torch.Tensor | None = None,
) -> torch.LongTensor:
    """Position of each token, where images and videos keep the places of their patches.

    A token of text takes one position. A map of an image or video takes as many positions as it has tokens at the full
    grid, and its tokens have those of `map_offsets`. With one grid for all images the graph is static.

    Args:
        placeholders: at least one, with masks `(batch, sequence)` that do not overlap. They have all placeholders of
            every image.
        attention_mask: `(batch, sequence)`, 0 at padding, which takes no position and has position 0. Or `(batch, 1,
            sequence, sequence)`, true where a token attends to another or to itself: then a token's position counts
            only what it attends to. Default: no padding.

    Returns:
        `(batch, sequence)`.
    """
    placeholders = list(placeholders)
    offset = torch.zeros_like(placeholders[0].mask, dtype=torch.long)
    step = torch.ones_like(offset)
    for mask, offsets, steps in placeholders:
        if len(offsets) == 0:
            continue
        # which of all image tokens a token is; the model refuses a wrong number of placeholders
        index = (mask.flatten().cumsum(0) - 1).view(mask.shape) % len(offsets)
        offset = torch.where(mask, offsets[index], offset)
        step = torch.where(mask, steps[index], step)
    if attention_mask is not None and attention_mask.ndim == 4:
        attended = (attention_mask[:, 0].tril() * step[:, None]).sum(-1)
        return (attended - step + offset).clamp(min=0)
    if attention_mask is None:
        return step.cumsum(-1) - step + offset
    step = step * attention_mask.long()
    return (step.cumsum(-1) - step + offset).masked_fill(attention_mask == 0, 0)


def position_behind(placeholders: Iterable[Places], attention_mask: torch.Tensor | None = None) -> torch.LongTensor:
    """Position `(batch, 1)` of a token of text behind the last one of each row, which may be an image's: then it is
    behind all patches of the image. Arguments are those of `patch_position_ids`, with a mask of two dimensions."""
    placeholders = [found._replace(mask=nn.functional.pad(found.mask, (0, 1))) for found in placeholders]
    if attention_mask is not None:
        attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
    return patch_position_ids(placeholders, attention_mask)[:, -1:]


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
