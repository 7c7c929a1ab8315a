# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny DeCo models for the suites, in the form that they expect (see transformers' test_modeling_llava.py)."""

from typing import ClassVar

import torch
from transformers_tests.test_modeling_common import floats_tensor, ids_tensor

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoModel


class DecoModelTester:
    """CLIP with a patch grid of 4 x 4, pooled to 2 x 2, and Llama."""

    base_model_class = DecoModel
    conditional_generation_class = DecoForConditionalGeneration
    is_training = True
    batch_size = 3
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99
    pad_token_id, bos_token_id, eos_token_id, image_token_id = range(4)
    pooled_grid_size = 2
    image_positions = "patch"
    num_image_tokens = 4
    config_fields: ClassVar[dict] = {}  # more fields of the config
    seq_length = encoder_seq_length = num_image_tokens + 7
    vision_config = {
        "model_type": "clip_vision_model",
        "image_size": 8,
        "patch_size": 2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
    }
    text_config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": 36,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "pad_token_id": pad_token_id,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> DecoConfig:
        return DecoConfig(
            vision_config=self.vision_config,
            text_config=self.text_config,
            image_token_id=self.image_token_id,
            pooled_grid_size=self.pooled_grid_size,
            image_positions=self.image_positions,
            vision_feature_layer=-1,
            **self.config_fields,
        )

    def prepare_config_and_inputs_for_common(self):
        num_special_tokens = max(self.placeholders) + 1
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - num_special_tokens)
        input_ids += num_special_tokens
        placeholders = [token for token, number in self.placeholders.items() for _ in range(number)]
        input_ids[:, : len(placeholders)] = torch.tensor(placeholders)
        return self.get_config(), {
            **self.visual_inputs(),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }

    @property
    def placeholders(self) -> dict[int, int]:
        """Placeholders of a sample: each token, and how many there are."""
        return {self.image_token_id: self.num_image_tokens}

    def visual_inputs(self) -> dict[str, torch.Tensor]:
        image_size = self.vision_config["image_size"]
        return {"pixel_values": floats_tensor([self.batch_size, 3, image_size, image_size])}


class Siglip2Qwen3Tester(DecoModelTester):
    """A tower without prefix tokens that takes flat patches, and grouped key-value heads."""

    vision_config = {
        **DecoModelTester.vision_config,
        "model_type": "siglip2_vision_model",
        "num_patches": 16,
    }
    text_config = {
        **DecoModelTester.text_config,
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 8,
    }


class Dinov2GemmaTester(DecoModelTester):
    """A tower with register tokens, and tied embeddings; tokens are numbered one after another."""

    image_positions = "sequence"
    vision_config = {
        **DecoModelTester.vision_config,
        "model_type": "dinov2_with_registers",
        "num_register_tokens": 2,
    }
    text_config = {
        **DecoModelTester.text_config,
        "model_type": "gemma",
        "num_key_value_heads": 2,
        "head_dim": 8,
    }


class ViewsTester(DecoModelTester):
    """Pictures of an overview and two tiles. A newline ends each row of the stitched map."""

    config_fields: ClassVar[dict] = {"image_grid_pinpoints": [[8, 8], [8, 16]], "image_newline": True}
    image_sizes = ((8, 16), (11, 20), (6, 13))
    num_image_tokens = 2 * 2 + 2 * (4 + 1)
    seq_length = encoder_seq_length = num_image_tokens + 7

    def visual_inputs(self):
        return {
            "pixel_values": floats_tensor([self.batch_size, 3, 3, 8, 8]),
            "image_sizes": torch.tensor(self.image_sizes),
        }


class VideosTester(DecoModelTester):
    """An image and a video of five frames, of which two are averaged. A newline is behind the last."""

    video_token_id = 4
    config_fields: ClassVar[dict] = {
        "video_token_id": video_token_id,
        "pooled_video_grid_size": 2,
        "frames_per_token_grid": 2,
        "video_newline": True,
    }
    num_image_tokens, num_video_tokens = 4, 3 * 4 + 1
    seq_length = encoder_seq_length = num_image_tokens + num_video_tokens + 7

    @property
    def placeholders(self):
        return {**super().placeholders, self.video_token_id: self.num_video_tokens}

    def visual_inputs(self):
        return {**super().visual_inputs(), "pixel_values_videos": floats_tensor([self.batch_size, 5, 3, 8, 8])}
