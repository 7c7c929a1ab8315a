# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DETR's embeddings of places on the feature map of a convolutional tower."""

import math

import pytest
import torch
from tiny import build_config, build_model, pixels

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.projectors import sine_positions


def test_each_cell_has_the_sines_of_its_row_and_column():
    rows, cols, width = 3, 5, 16
    found = sine_positions((rows, cols), width).view(rows, cols, width)
    for row in range(rows):
        for col in range(cols):
            expected = []
            for index, length in ((row, rows), (col, cols)):
                for number in range(width // 4):
                    angle = 2 * math.pi * (index + 0.5) / length / 10000 ** (number / (width // 4))
                    expected += [math.sin(angle), math.cos(angle)]
            assert found[row, col].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_model_adds_them_to_its_patches():
    with_sines = build_model("efficientnet", vision_position_embedding="sine").eval()
    without = build_model("efficientnet").eval()
    without.load_state_dict(with_sines.state_dict())
    height, width = 3 * with_sines.config.patch_size, 2 * with_sines.config.patch_size
    views = {"pixel_values": pixels(2, height, width)}
    with torch.inference_mode():
        difference = with_sines.model.encode_views(views)[1] - without.model.encode_views(views)[1]
    expected = sine_positions((3, 2), with_sines.config.vision_hidden_size)
    torch.testing.assert_close(difference, expected.expand_as(difference), atol=1e-5, rtol=0)


def test_a_saved_model_keeps_them(tmp_path):
    build_model("efficientnet", vision_position_embedding="sine").save_pretrained(tmp_path)
    loaded = DecoForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vision_position_embedding == "sine"


def test_a_transformer_needs_none():
    with pytest.raises(ValueError, match=r"vision_position_embedding='sine' is for convolutional towers; a clip"):
        build_config("clip", vision_position_embedding="sine")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"vision_position_embedding must be 'sine' or None, got 'learned'"):
        build_config("efficientnet", vision_position_embedding="learned")
