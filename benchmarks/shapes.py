# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A library of the benchmarks: models of published shapes with random weights, and counters of time and memory."""

import math
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # private, seen in torch 2.13
from torch.utils._pytree import tree_leaves  # private, seen in torch 2.13
from transformers import AutoModelForImageTextToText, CLIPImageProcessor, LlavaNextConfig, LlavaOnevisionConfig
from transformers.generation import BaseStreamer

from modeling_deco import DecoConfig, DecoProcessor
from modeling_deco.worlds.digits.tokenizer import build_tokenizer
from modeling_deco.worlds.emoji.efficientnet_lite0 import build_efficientnet_lite0_config

RESULTS = Path(__file__).with_name("results")
NUM_TEXT_TOKENS = 40  # tokens of a prompt without its image

# published configurations of decoders: Qwen2.5-0.5B and 1.5B, and Llama-7B, the default
_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
TEXT_CONFIGS = {
    "0.5b": {
        **_QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5b": {
        **_QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "7b": {"vocab_size": 32064},
}
# SmolLM2-135M, for a tower that is small too: EfficientNet-Lite0 at 448 pixels
_SMOL = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# height and width of the picture that transformers' models of high resolution see: five views and ten
PICTURES = {"next": (672, 672), "onevision": (1152, 1152)}
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def build_config(shape: str, num_layers: int | None = None, **kwargs) -> DecoConfig:
    """CLIP ViT-L/14-336, the default tower, with a decoder.

    Args:
        shape: a key of `TEXT_CONFIGS`, or `"tiny"`, with a small tower that has as many patches.
        num_layers: number of layers of tower and decoder. Default: all.
        kwargs: fields of `DecoConfig`. `text_config` is added to the configuration of the shape.
    """
    text_config = {**_TINY, "vocab_size": 32064} if shape == "tiny" else dict(TEXT_CONFIGS[shape])
    vision_config = DecoConfig().vision_config.to_dict()  # without the layer that DeCo does not use
    if shape == "tiny":
        vision_config |= {**_TINY, "image_size": 96, "patch_size": 4}
    if num_layers is not None:
        text_config["num_hidden_layers"] = vision_config["num_hidden_layers"] = num_layers
    text_config |= kwargs.pop("text_config", {})
    return DecoConfig(vision_config=vision_config, vision_feature_layer=-1, text_config=text_config, **kwargs)


def build_lite0_config(num_layers: int | None = None) -> DecoConfig:
    """EfficientNet-Lite0 at 448 pixels, whose map has 14 x 14 cells of 1,280 channels, with SmolLM2-135M.

    Args:
        num_layers: number of layers of the decoder. Default: all.
    """
    text_config = _SMOL if num_layers is None else {**_SMOL, "num_hidden_layers": num_layers}
    return DecoConfig(vision_config=build_efficientnet_lite0_config(448), text_config=text_config, pooled_grid_size=14)


def build_views_config(shape: str, num_layers: int | None = None) -> LlavaNextConfig | LlavaOnevisionConfig:
    """LLaVA-NeXT with CLIP ViT-L/14-336, or LLaVA-OneVision with SigLIP-so400m/14-384, with the decoder `"0.5b"`.

    Args:
        shape: a key of `PICTURES`.
        num_layers: number of layers of tower and decoder. Default: all, of which LLaVA-NeXT does not use the tower's
            last one. Among few layers it would weigh too much, so it is left out there.
    """
    config_class = {"next": LlavaNextConfig, "onevision": LlavaOnevisionConfig}[shape]
    config = config_class(text_config=TEXT_CONFIGS["0.5b"], tie_word_embeddings=True)  # the towers are the defaults
    if num_layers is not None:
        config.text_config.num_hidden_layers = num_layers
        config.text_config.layer_types = config.text_config.layer_types[:num_layers]
        config.vision_config.num_hidden_layers, config.vision_feature_layer = num_layers, -1
    return config


def save_random_checkpoint(
    folder: Path, shape: str, dtype: torch.dtype, num_layers: int | None = None, projector: str = "avg_pool-144"
) -> None:
    """Save a checkpoint with the tokenizer of the digits world.

    Args:
        projector: `projector_type` and tokens per image, as in `"avg_pool-64"`.
    """
    projector_type, num_tokens = projector.split("-")
    tokenizer = build_tokenizer()
    text_config = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if shape == "tiny" or num_layers is not None:  # a full vocabulary would outweigh so few layers
        text_config["vocab_size"] = len(tokenizer)
    config = build_config(
        shape,
        num_layers,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_type=projector_type,
        pooled_grid_size=math.isqrt(int(num_tokens)),
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False).save_pretrained(folder)
    side = config.vision_config.image_size
    image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    DecoProcessor(image_processor, tokenizer, config.pooled_grid_size).save_pretrained(folder)


class TokenTimes(BaseStreamer):
    """The time of each token of an answer. `generate` passes tokens on the CPU, so they include the device's time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.began, self.times = clock(), []

    def put(self, value):
        self.times.append(self.clock())

    def end(self):
        pass

    @property
    def first_token_seconds(self) -> float:
        return self.times[1] - self.began  # the prompt is at index 0

    @property
    def seconds_per_token(self) -> float:
        """Mean over the tokens after the first."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators create: `held` now, and the `peak`."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known = weakref.WeakSet()  # storages

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.known.update(leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf))
        result = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if torch.is_tensor(leaf)):
            if storage not in self.known:  # storages of weights and inputs are known already
                self.known.add(storage)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self.release, storage.nbytes())
        return result

    def release(self, num_bytes: int):
        self.held -= num_bytes
