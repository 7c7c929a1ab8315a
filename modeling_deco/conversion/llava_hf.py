# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of transformers' LLaVA (llava-hf)."""

from transformers import LlavaConfig

from ..utils.errors import InputError
from .checkpoints import LlavaCheckpoint, add_tensors, build_config
from .layouts import LLAVA_HF
from .sources import Source


def read_llava_hf(source: Source, raw_config: dict, pooled_grid_size) -> LlavaCheckpoint:
    """Read a checkpoint of transformers' LLaVA. The arguments are those of `read_checkpoint`."""
    layer = raw_config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise InputError(
            f"vision_feature_layer {layer} in config.json of {source.name} is not one layer; DeCo reads one."
        )
    llava_config = LlavaConfig.from_dict(raw_config)
    checkpoint = LlavaCheckpoint("llava-hf", {"source": source}, {}, {}, source, source)
    add_tensors(checkpoint, source.read_weights(), LLAVA_HF)
    checkpoint.config = build_config(
        pooled_grid_size,
        image_positions="patch",
        vision_config=llava_config.vision_config,
        text_config=llava_config.text_config,
        image_token_id=llava_config.image_token_index,
        projector_hidden_act=llava_config.projector_hidden_act,
        multimodal_projector_bias=llava_config.multimodal_projector_bias,
        vision_feature_layer=layer,
        vision_feature_select_strategy=llava_config.vision_feature_select_strategy,
        tie_word_embeddings=raw_config.get("tie_word_embeddings", False),
    )
    return checkpoint
