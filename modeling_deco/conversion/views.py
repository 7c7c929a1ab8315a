# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Views and videos of the original code: LLaVA-1.6 (haotian-liu/LLaVA), LLaVA-NeXT-Video and LLaVA-OneVision
(LLaVA-VL/LLaVA-NeXT)."""

import ast
import re
from typing import Any

from ..llava import ONEVISION_VIDEOS
from ..utils.errors import InputError

_LARGEST_GRID = 2**8  # views a side


def view_fields(raw_config: dict, view_size: int, where: str) -> dict[str, Any]:
    """The fields of a `DecoConfig` for views and videos; none if an image is one view.

    Args:
        raw_config: the config of the original code.
        view_size: the image size of the vision tower.
        where: name of the file in messages.

    Raises:
        InputError: DeCo does not have what the config asks for.
    """
    aspect_ratio = raw_config.get("image_aspect_ratio") or "square"
    merge_type = raw_config.get("mm_patch_merge_type") or "flat"
    is_anyres = re.fullmatch(r"anyres(_max_\d+)?", str(aspect_ratio)) is not None
    if not is_anyres and aspect_ratio not in ("square", "pad"):
        raise InputError(
            f"image_aspect_ratio {aspect_ratio!r} in {where}: DeCo supports 'square', 'pad', 'anyres' and "
            f"'anyres_max_N'."
        )
    expected = "spatial_unpad" if is_anyres else "flat"
    if merge_type != expected:
        raise InputError(
            f"mm_patch_merge_type {merge_type!r} in {where}: with image_aspect_ratio {aspect_ratio!r} DeCo supports "
            f"{expected!r} alone; it stitches tiles to one map, without padding and with a newline at each row's end."
        )
    if not is_anyres:
        if raw_config.get("mm_resampler_type"):
            raise InputError(f"mm_resampler_type {raw_config['mm_resampler_type']!r} in {where}: DeCo has none.")
        return {}
    return {
        "image_grid_pinpoints": parse_pinpoints(raw_config.get("image_grid_pinpoints"), view_size, where),
        "image_newline": True,
        "vision_aspect_ratio": aspect_ratio,
        **_video_fields(raw_config, is_onevision=aspect_ratio != "anyres", where=where),
    }


def parse_pinpoints(pinpoints, view_size: int, where: str) -> list:
    """`image_grid_pinpoints` as transformers has them: `[height, width]` in pixels.

    The original code has `[width, height]`, also as a string, or two corners of a range of grids in a string:
    `"(1x1),...,(6x6)"`. A list that is the same both ways stays in its order, as in llava-hf's conversions: where two
    sizes fit equally well (pictures smaller than a view), transformers and the original code take the first one.
    """
    if isinstance(pinpoints, str) and "x" in pinpoints:
        grids = [(int(cols), int(rows)) for cols, rows in re.findall(r"\((\d{1,6})x(\d{1,6})\)", pinpoints)]
        if not grids or not all(1 <= side <= _LARGEST_GRID for grid in grids for side in grid):
            raise InputError(
                f"image_grid_pinpoints {pinpoints[:80]!r} in {where} is not a range of grids such as "
                f"'(1x1),...,(6x6)', of 1 to {_LARGEST_GRID} views a side."
            )
        (first_cols, first_rows), (last_cols, last_rows) = grids[0], grids[-1]
        pinpoints = [
            [cols * view_size, rows * view_size]
            for cols in range(first_cols, last_cols + 1)
            for rows in range(first_rows, last_rows + 1)
        ]
    elif isinstance(pinpoints, str):
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # refused below
    is_list = isinstance(pinpoints, list | tuple) and len(pinpoints) > 0
    if not is_list or not all(isinstance(size, list | tuple) and len(size) == 2 for size in pinpoints):
        raise InputError(
            f"image_grid_pinpoints {str(pinpoints)[:80]!r} in {where} is not a list of sizes [width, height]."
        )
    turned = [[height, width] for width, height in pinpoints]
    as_they_are = [list(size) for size in pinpoints]
    return as_they_are if all(size in as_they_are for size in turned) else turned


def _video_fields(raw_config: dict, is_onevision: bool, where: str) -> dict[str, Any]:
    """How frames are pooled: by the resampler of LLaVA-NeXT-Video before the projector, or as in OneVision."""
    resampler = raw_config.get("mm_resampler_type")
    mode = raw_config.get("mm_spatial_pool_mode") or ("bilinear" if is_onevision else None)
    if resampler not in (None, "", "spatial_pool"):
        raise InputError(
            f"mm_resampler_type {resampler!r} in {where}: DeCo supports 'spatial_pool' (LLaVA-NeXT-Video) or none."
        )
    supported = ("average",) if resampler else ("bilinear", None)
    if mode not in supported:
        raise InputError(
            f"mm_spatial_pool_mode {mode!r} in {where}: DeCo averages the patches of a frame before the projector "
            f"(mm_resampler_type 'spatial_pool' with 'average'), or interpolates behind it ('bilinear' without one)."
        )
    newline = raw_config.get("mm_newline_position") or ("one_token" if mode == "bilinear" else "no_token")
    if newline not in ("one_token", "no_token"):
        raise InputError(
            f"mm_newline_position {newline!r} in {where}: DeCo supports one newline behind a video ('one_token') or "
            f"none ('no_token'). LLaVA-OneVision has the former."
        )
    if mode is None:
        return {}
    return {
        **ONEVISION_VIDEOS,
        "spatial_pool_mode": mode,
        "spatial_pool_stride": raw_config.get("mm_spatial_pool_stride") or 2,
        "video_newline": newline == "one_token",
    }
