# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare the logits of a converted model with LLaVA's: at the full grid they are equal, bit for bit."""

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from ..modeling_deco import DecoForConditionalGeneration
from ..utils.errors import InputError
from ..views import num_map_tokens, num_map_views, one_map

_NUM_WORDS = 16


@torch.inference_mode()
def compare_logits(source: Path, converted: Path, is_cast: bool) -> dict:
    """Run transformers' LLaVA on the source and DeCo on the converted folder, one after the other in float32, with
    random pixels and random words. Where images are cut into views, the image is wide, and has padding.

    Args:
        source: a llava-hf folder.
        converted: the DeCo folder.
        is_cast: the weights were cast, so a difference is no error.

    Returns:
        `max_abs_difference` of the logits, and their number, `num_logits`.

    Raises:
        InputError: the logits differ.
    """
    model = DecoForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).eval()
    inputs = _random_inputs(model.config)
    logits = {"deco": model(**inputs, pooled_grid_sizes=torch.tensor([model.config.patch_grid])).logits}
    del model  # so that only one of them needs memory
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, trust_remote_code=False).eval()
    logits["llava"] = model(**inputs).logits
    num_rows = logits["llava"].shape[-1]  # DeCo's vocabulary may have grown
    difference = (logits["deco"][..., :num_rows] - logits["llava"]).abs().max().item()
    if not difference <= 0 and not is_cast:  # NaN is a difference too
        raise InputError(f"The logits of {converted} differ from LLaVA's on {source} by up to {difference:.3g}.")
    return {"max_abs_difference": difference, "num_logits": logits["llava"].numel()}


def _random_inputs(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    height, width = config.view_size
    size, maps = (3 * height, 7 * width), one_map(config.patch_grid, config.patch_grid)
    inputs = {}
    if config.image_grid_pinpoints is not None:
        maps = config.views.image_maps(size, config.patch_grid)
        inputs["image_sizes"] = torch.tensor([size])
    pixel_values = torch.randn(num_map_views(maps), 3, height, width, generator=generator)
    words = torch.randint(config.image_token_id, (_NUM_WORDS,), generator=generator)
    placeholders = torch.full((num_map_tokens(maps),), config.image_token_id)
    return {
        **inputs,
        "input_ids": torch.cat([words[:4], placeholders, words[4:]])[None],  # (1, 16 + image tokens)
        "pixel_values": pixel_values if config.image_grid_pinpoints is None else pixel_values[None],
    }
