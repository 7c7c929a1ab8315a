# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Convolutional vision towers, whose output is a feature map: how large the map is, known from the config alone.

A cell of the map is DeCo's patch. Its side is the network's stride, and the network decides what becomes of the pixels
at the border where the stride does not divide the image. Each layer with a stride rounds up or down. Layers that do
either, one after another, make of a side of `n` pixels `(n + padding) // stride` cells.
"""

import math
from dataclasses import dataclass
from typing import Any

# A tower without an image size in its config gets ImageNet's.
_IMAGE_SIZE = 224


@dataclass(frozen=True)
class FeatureMap:
    """The last feature map of a convolutional network.

    Args:
        channels: width of a cell.
        stride: pixels from one cell to the next.
        padding: `n` pixels become `(n + padding) // stride` cells.
    """

    channels: int
    stride: int
    padding: int = 0


def has_feature_map(vision_config) -> bool:
    """Whether the output of a vision tower is a feature map."""
    return vision_config.model_type in FEATURE_MAP_TOWERS


def feature_map(vision_config) -> FeatureMap | None:
    """The feature map of a vision tower, None if its output are tokens.

    Raises:
        ValueError: the config does not say what the map is.
    """
    if not has_feature_map(vision_config):
        return None
    return FEATURE_MAP_TOWERS[vision_config.model_type](vision_config)


def image_size_of(vision_config) -> int | list[int]:
    """The image size in pixels, a side or `[height, width]`, of a tower that takes any size: that of its config, or
    ImageNet's. A `timm_wrapper` has it in timm's own part of the config."""
    size = getattr(vision_config, "image_size", None)
    if size is None:
        size = (getattr(vision_config, "pretrained_cfg", None) or {}).get("input_size", (3, _IMAGE_SIZE, _IMAGE_SIZE))
        size = list(size[1:])
    return size


def _with_strides(channels: int, layers: list[tuple[int, bool]]) -> FeatureMap:
    """The map behind layers that have a stride and round up (`True`) or down, one after another."""
    stride, padding = 1, 0
    for step, rounds_up in layers:
        padding += (step - 1) * stride if rounds_up else 0
        stride *= step
    return FeatureMap(channels, stride, padding)


def _efficientnet(config) -> FeatureMap:
    layers, block = [(2, False)], 0
    for stride, repeats in zip(config.strides, config.num_block_repeats, strict=True):
        if stride > 1:
            layers.append((stride, block in config.depthwise_padding))  # padded on both sides
        block += math.ceil(config.depth_coefficient * repeats)
    return _with_strides(config.hidden_dim, layers)


def _convnext(config) -> FeatureMap:
    halvings = config.num_stages - 1
    stem = _int("patch_size", config.patch_size)
    return _with_strides(config.hidden_sizes[-1], [(stem, False), *[(2, False)] * halvings])


def _mobilenet_v1(config) -> FeatureMap:
    return _with_strides(max(int(1024 * config.depth_multiplier), config.min_depth), [(2, True)] * 5)


def _mobilenet_v2(config) -> FeatureMap:
    channels = 1280
    if config.depth_multiplier >= 1.0 or not config.finegrained_output:
        channels = _make_divisible(round(1280 * config.depth_multiplier), config.depth_divisible_by, config.min_depth)
    # layers behind the one that reaches output_stride are dilated; without such a layer, all have their strides
    strides = (2, 4, 8, 16, 32)
    halvings = strides.index(config.output_stride) + 1 if config.output_stride in strides else len(strides)
    return _with_strides(channels, [(2, True)] * halvings)


def _make_divisible(number: int, divisor: int, least: int) -> int:
    """The number of channels that transformers' MobileNetV2 makes of another."""
    rounded = max(least, int(number + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * number else rounded + divisor


def _resnet(config) -> FeatureMap:
    halvings = 2 + config.downsample_in_first_stage + len(config.depths) - 1  # the stem has two
    return _with_strides(config.hidden_sizes[-1], [(2, True)] * halvings)


def _regnet(config) -> FeatureMap:
    halvings = 1 + config.downsample_in_first_stage + len(config.depths) - 1
    return _with_strides(config.hidden_sizes[-1], [(2, True)] * halvings)


def _timm_wrapper(config) -> FeatureMap:
    channels = getattr(config, "hidden_size", getattr(config, "num_features", None))
    stride = getattr(config, "patch_size", None)
    for name, value, example in (("hidden_size", channels, 3072), ("patch_size", stride, 64)):
        if value is None:
            raise ValueError(
                f"vision_config.{name} is missing: the config of a timm_wrapper ({config.architecture}) does not say "
                f"what feature map the network has; set it (for fastvit_mci3, {name}={example})."
            )
    return FeatureMap(_int("hidden_size", channels), _int("patch_size", stride))


def _int(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"vision_config.{name} must be an int, got {value!r}: the patches of a DeCo are square.")
    return value


FEATURE_MAP_TOWERS = {
    "efficientnet": _efficientnet,
    "convnext": _convnext,
    "convnextv2": _convnext,
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
    "regnet": _regnet,
    "resnet": _resnet,
    "timm_wrapper": _timm_wrapper,
}
