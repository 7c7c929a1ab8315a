# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The processor of the digits world: its tokenizer and CLIP's image processor at 96 x 96 pixels."""

from transformers import CLIPImageProcessor

from ... import DecoProcessor
from .scenes import IMAGE_SIZE
from .tokenizer import build_tokenizer
from .tower_model import IMAGE_MEAN, IMAGE_STD, PATCH_SIZE


def build_processor(pooled_grid_size: int = 6) -> DecoProcessor:
    """The processor that the shipped checkpoint was trained with."""
    image_processor = CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return DecoProcessor(image_processor, build_tokenizer(), pooled_grid_size, patch_size=PATCH_SIZE)
