# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of transformers' LLaVA (llava-hf)."""

from ..llava import deco_fields
from ..utils.errors import as_input_errors
from .checkpoints import LlavaCheckpoint, add_tensors, build_config
from .layouts import LLAVA_HF
from .sources import Source


def read_llava_hf(source: Source, raw_config: dict, pooled_grid_size) -> LlavaCheckpoint:
    """Read a checkpoint of transformers' LLaVA. The arguments are those of `read_checkpoint`."""
    with as_input_errors():
        fields = deco_fields(raw_config, f"config.json of {source.name}")
    video_token_id = fields.pop("video_token_id", None)  # `build_processor` sets it
    checkpoint = LlavaCheckpoint("llava-hf", {"source": source}, {}, {}, source, source, video_token_id=video_token_id)
    add_tensors(checkpoint, source.read_weights(), LLAVA_HF)
    checkpoint.config = build_config(pooled_grid_size, **fields)
    return checkpoint
