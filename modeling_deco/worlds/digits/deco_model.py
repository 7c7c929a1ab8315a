# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A DeCo model for the digits world: the trained tower with a new projector and a new language model."""

import os

import torch
from transformers import AutoConfig, CLIPVisionModel, LlamaConfig, PreTrainedConfig

from ... import DecoConfig, DecoForConditionalGeneration, DecoModel, DecoProcessor, pool_patch_grid


def build_model(
    tower_dir: str | os.PathLike,
    processor: DecoProcessor,
    projector_type: str = "avg_pool",
    text_config_class: type[PreTrainedConfig] = LlamaConfig,
    **text_fields,
) -> DecoForConditionalGeneration:
    """Join a trained tower with an untrained projector and an untrained language model of four layers and width 128,
    all in float32.

    Args:
        tower_dir: a tower, or a DeCo checkpoint with one.
        text_config_class: the kind of language model.
        text_fields: more fields of its config.
    """
    tokenizer = processor.tokenizer
    if AutoConfig.from_pretrained(tower_dir, trust_remote_code=False).model_type == "deco":
        vision_tower = DecoModel.from_pretrained(tower_dir, dtype=torch.float32).vision_tower
    else:
        vision_tower = CLIPVisionModel.from_pretrained(tower_dir, dtype=torch.float32)
    text_config = text_config_class(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **text_fields,
    )
    config = DecoConfig(
        vision_config=vision_tower.config,
        text_config=text_config,
        image_token_id=processor.image_token_id,
        pooled_grid_size=processor.pooled_grid_size,
        image_positions="patch",
        projector_type=projector_type,
        vision_feature_layer=-1,
    )
    model = DecoForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.generation_config.max_new_tokens = 16
    return model


@torch.no_grad()
def whiten_projector(model: DecoForConditionalGeneration, pixel_values: torch.Tensor) -> None:
    """Initialize the projector's first layer as a random rotation of the whitened pooled features.

    Colour is 2 % of the variance of the tower's features, and digits are 40 %. With the usual initialization a model
    had not learned colours after 30 thousand pictures: it called every digit purple.

    Args:
        pixel_values: some training pictures, `(num_images, 3, 96, 96)`.
    """
    projector, config = model.model.multi_modal_projector, model.config
    patch_features = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
    pooled = pool_patch_grid(patch_features, config.patch_grid, config.pooled_grid).flatten(0, 1)
    variances, directions = torch.linalg.eigh(torch.cov(pooled.T))
    scales = variances.clamp(min=variances.max() * 1e-4).rsqrt()  # the last directions are numerical noise
    rotation, _ = torch.linalg.qr(torch.randn_like(projector.linear_1.weight))
    projector.linear_1.weight.copy_(rotation @ (directions * scales) @ directions.T)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ pooled.mean(0))
