# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random backbones, a word-level tokenizer and pictures: what the tests are made of, without a download.

Images are 24 x 24 pixels with patches of 4, so the patch grid is 6 x 6; the pooled grid is 3 x 3 where no test says
otherwise.
"""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerFast,
)

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoProcessor
from modeling_deco.processing_deco import arguments_of_config

IMAGE_SIZE, PATCH_SIZE, PATCH_GRID = 24, 4, (6, 6)
VOCAB_SIZE = 64

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
VISION_CONFIGS = {
    "clip": {"model_type": "clip_vision_model", "projection_dim": 16, **_VISION},
    "siglip": {"model_type": "siglip_vision_model", **_VISION},
    "siglip2": {
        "model_type": "siglip2_vision_model",
        "num_patches": 36,
        **{name: value for name, value in _VISION.items() if name != "image_size"},
    },
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, **_VISION},
    "dinov2_with_registers": {
        "model_type": "dinov2_with_registers",
        "num_register_tokens": 4,
        "mlp_ratio": 2,
        **_VISION,
    },
}
# convolutional towers of the same image size and stride
FEATURE_MAP_CONFIGS: dict[str, dict] = {
    "efficientnet": {
        "model_type": "efficientnet",
        "width_coefficient": 0.02,  # 32 channels, of 1280
        "depth_coefficient": 1.0,
        "in_channels": [400, 800],
        "out_channels": [800, 800],
        "kernel_sizes": [3, 5],
        "strides": [1, 2],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 2],
        "hidden_dim": 24,
        "image_size": IMAGE_SIZE,
    },
    "convnextv2": {
        "model_type": "convnextv2",
        "patch_size": 2,
        "num_stages": 2,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "image_size": IMAGE_SIZE,
    },
    "mobilenet_v2": {
        "model_type": "mobilenet_v2",
        "depth_multiplier": 0.1,
        "finegrained_output": False,
        "output_stride": PATCH_SIZE,
        "image_size": IMAGE_SIZE,
    },
}

_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT_CONFIGS = {
    "llama": {"model_type": "llama", **_TEXT},
    "qwen2": {"model_type": "qwen2", **_TEXT},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, **_TEXT},
    "mistral": {"model_type": "mistral", **_TEXT},
    "gemma": {"model_type": "gemma", "head_dim": 16, **_TEXT},
    "phi3": {"model_type": "phi3", **_TEXT},
}

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = ("user", "assistant", "what", "is", "this", "a", "the", "red", "blue", "cat", "dog", "two", "?", ".", ":")
IMAGE_TOKEN_ID = len(SPECIAL_TOKENS) + len(WORDS)  # "<image>" comes after the words
VIDEO_TOKEN_ID = IMAGE_TOKEN_ID + 1

# what a DeCo of each family of LLaVA has, besides backbones; pinpoints are of 1 to 6 tiles
PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48], [24, 72], [72, 48]]
FAMILIES: dict[str, dict] = {
    "llava_next": {"image_grid_pinpoints": PINPOINTS, "image_newline": True},
    "llava_next_video": {
        "image_grid_pinpoints": PINPOINTS,
        "image_newline": True,
        "video_token_id": VIDEO_TOKEN_ID,
        "spatial_pool_stride": 2,
    },
    "llava_onevision": {
        "image_grid_pinpoints": PINPOINTS,
        "image_newline": True,
        "vision_aspect_ratio": "anyres_max_4",
        "video_token_id": VIDEO_TOKEN_ID,
        "spatial_pool_mode": "bilinear",
        "spatial_pool_stride": 2,
        "video_newline": True,
    },
    "tiles": {"image_grid_pinpoints": PINPOINTS, "image_overview": False},
}
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message['role'] + ' : ' -}}
{%- if message['content'] is string -%}
{{- message['content'] + ' ' -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<' + part['type'] + '>' if part['type'] in ('image', 'video') else part['text'] + ' ' -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant : ' -}}{%- endif -%}
"""


def build_config(vision="clip", text="llama", **kwargs) -> DecoConfig:
    choices = {"image_token_id": IMAGE_TOKEN_ID, "pooled_grid_size": 3, **kwargs}
    vision_config = {**VISION_CONFIGS, **FEATURE_MAP_CONFIGS}[vision]
    return DecoConfig(vision_config=vision_config, text_config=TEXT_CONFIGS[text], **choices)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give the model weights with which its logits depend on all of its inputs, which a usual initialization does not:
    there every greedy continuation is one token repeated."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(noise * 0.1 + (0 if name.endswith("bias") else 1))
    return model.eval()


def build_model(vision="clip", text="llama", seed=0, **kwargs) -> DecoForConditionalGeneration:
    model = randomize(DecoForConditionalGeneration(build_config(vision, text, **kwargs)), seed)
    if vision in FEATURE_MAP_CONFIGS:
        calibrate(model.model.vision_tower)
    return model


@torch.no_grad()
def calibrate(tower: torch.nn.Module) -> None:
    """Give a tower's batch normalizations the statistics of pictures, so that its features are of a usual size."""
    tower.train()
    tower(pixels(8, seed=1))
    tower.eval()


def build_tokenizer(with_image_token=True, with_video_token=False, **kwargs) -> PreTrainedTokenizerFast:
    words = (*SPECIAL_TOKENS, *WORDS)
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs
    )
    if with_image_token:
        tokenizer.add_tokens("<image>", special_tokens=True)
    if with_video_token:
        tokenizer.add_tokens("<video>", special_tokens=True)
    return tokenizer


def build_image_processor(size: int = IMAGE_SIZE) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False)


def build_processor(pooled_grid_size=3, **kwargs) -> DecoProcessor:
    return DecoProcessor(build_image_processor(), build_tokenizer(), pooled_grid_size=pooled_grid_size, **kwargs)


def build_family(family: str, pooled_grid_size=3, seed=0, **kwargs) -> DecoForConditionalGeneration:
    """A DeCo with the views and videos of a family of LLaVA."""
    vision, text = ("siglip", "qwen2") if family == "llava_onevision" else ("clip", "llama")
    text_config = {**TEXT_CONFIGS[text], "max_position_embeddings": 2048}
    fields = {"image_token_id": IMAGE_TOKEN_ID, "pooled_grid_size": pooled_grid_size, **FAMILIES[family], **kwargs}
    config = DecoConfig(vision_config=VISION_CONFIGS[vision], text_config=text_config, **fields)
    return randomize(DecoForConditionalGeneration(config), seed)


def build_family_processor(config: DecoConfig) -> DecoProcessor:
    """The processor of a model of `build_family`."""
    image_processor = LlavaOnevisionImageProcessorPil if config.video_newline else LlavaNextImageProcessorPil
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return DecoProcessor(
        image_processor(size=size, crop_size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        build_tokenizer(with_video_token=config.video_token_id is not None),
        chat_template=CHAT_TEMPLATE,
        **arguments_of_config(config),
    )


def picture(seed: int, height: int = 30, width: int = 40) -> Image.Image:
    """A smooth random picture: blocks of 5 x 5 pixels in random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(5, axis=0).repeat(5, axis=1))


def pixels(num_images: int, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(seed))


def prompt(*parts) -> list[int]:
    """Token ids from words, and from numbers of image placeholders: `prompt("what", 9, "?")`."""
    ids = [1]
    for part in parts:
        if isinstance(part, int):
            ids += [IMAGE_TOKEN_ID] * part
        else:
            ids += [len(SPECIAL_TOKENS) + WORDS.index(word) for word in part.split()]
    return ids


def batch(*prompts) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of prompts, padded on the left."""
    length = max(map(len, prompts))
    missing = [length - len(ids) for ids in prompts]
    return {
        "input_ids": torch.tensor([[0] * pad + ids for pad, ids in zip(missing, prompts, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (length - pad) for pad in missing]),
    }
