# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare the logits of a converted model with LLaVA's: at the patch grid they are equal, bit for bit."""

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from ..modeling_deco import DecoForConditionalGeneration
from ..utils.errors import InputError

_NUM_WORDS = 16


@torch.inference_mode()
def compare_logits(source: Path, converted: Path, is_cast: bool) -> dict:
    """Run transformers' LLaVA on the source and DeCo on the converted folder, one after the other in float32, with a
    random image and random words.

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
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    logits["llava"] = model(**inputs).logits
    num_rows = logits["llava"].shape[-1]  # DeCo's vocabulary may have grown
    difference = (logits["deco"][..., :num_rows] - logits["llava"]).abs().max().item()
    if not difference <= 0 and not is_cast:  # NaN is a difference too
        raise InputError(f"The logits of {converted} differ from LLaVA's on {source} by up to {difference:.3g}.")
    return {"max_abs_difference": difference, "num_logits": logits["llava"].numel()}


def _random_inputs(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    (rows, cols), patch_size = config.patch_grid, config.vision_config.patch_size
    words = torch.randint(config.image_token_id, (_NUM_WORDS,), generator=generator)
    placeholders = torch.full((rows * cols,), config.image_token_id)
    return {
        "input_ids": torch.cat([words[:4], placeholders, words[4:]])[None],  # (1, 16 + patches)
        "pixel_values": torch.randn(1, 3, rows * patch_size, cols * patch_size, generator=generator),
    }
