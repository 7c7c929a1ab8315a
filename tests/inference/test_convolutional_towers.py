# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Models with a convolutional vision tower in int8, in 4 bits, in bfloat16, and in `deco info`."""

import json

import pytest
import tiny
import tiny_training
import torch
from torch import nn
from typer.testing import CliRunner

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.cli import app
from modeling_deco.inference.costs import describe_config
from modeling_deco.inference.quantization import Int8Linear, nf4_config, quantize_to_int8

TOWERS = list(tiny.FEATURE_MAP_CONFIGS)


def inputs() -> dict:
    return {**tiny.batch(tiny.prompt("what is", 9, "?")), "pixel_values": tiny.pixels(1)}


@pytest.mark.parametrize("vision", TOWERS)
@torch.no_grad()
def test_int8_takes_the_linear_layers_and_leaves_convolutions(vision):
    model = tiny.build_model(vision)
    tower = model.model.vision_tower
    convolutions = {name: module.weight.clone() for name, module in tower.named_modules() if type(module) is nn.Conv2d}
    num_linears = sum(type(module) is nn.Linear for module in tower.modules())
    assert (num_linears > 0) == (vision == "convnextv2")
    expected = model(**inputs()).logits
    quantize_to_int8(model)
    assert sum(isinstance(module, Int8Linear) for module in tower.modules()) == num_linears
    for name, weight in convolutions.items():
        assert torch.equal(tower.get_submodule(name).weight, weight)
    found = model(**inputs()).logits
    assert 0 < (found - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_checkpoint_loads_in_another_dtype(vision, dtype, tmp_path):
    tiny.build_model(vision).to(torch.bfloat16).save_pretrained(tmp_path)
    model = DecoForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    found = {tensor.dtype for tensor in model.model.vision_tower.state_dict().values()}
    assert found - {torch.int64} == {dtype}
    assert model(**inputs()).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_is_that_of_the_language_model(implementation, tmp_path):
    tiny.build_model("efficientnet").save_pretrained(tmp_path)
    model = DecoForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    assert model.model.language_model.config._attn_implementation == implementation
    model.set_attn_implementation("eager" if implementation == "sdpa" else "sdpa")
    assert model.model.language_model.config._attn_implementation != implementation
    assert model(**inputs()).logits.isfinite().all()


@pytest.mark.parametrize("vision", TOWERS)
@torch.no_grad()
def test_4_bits_are_the_language_models_alone(vision, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = tiny_training.save_checkpoint(tmp_path / "model", hidden_size=64, vision=vision)
    model = DecoForConditionalGeneration.from_pretrained(folder, quantization_config=nf4_config())
    kinds = {type(module).__name__ for module in model.model.vision_tower.modules()}
    assert "Linear4bit" not in kinds
    assert "Linear4bit" in {type(module).__name__ for module in model.model.language_model.modules()}
    expected = DecoForConditionalGeneration.from_pretrained(folder).model.vision_tower(tiny.pixels(1))
    found = model.model.vision_tower(tiny.pixels(1))
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert model(**inputs()).logits.isfinite().all()


def test_info_says_that_the_tower_has_a_feature_map(tmp_path):
    folder = tiny_training.save_checkpoint(tmp_path / "model", vision="efficientnet")
    about = describe_config(DecoForConditionalGeneration.from_pretrained(folder).config)
    assert about["vision_tower"] == {"type": "efficientnet", "layers": None, "hidden_size": 24}
    assert (about["patch_size"], about["patch_grid"], about["parameters"]["vision_tower"]) == (4, [6, 6], 5506)
    found = CliRunner().invoke(app, ["info", str(folder)])
    assert "image -> efficientnet, feature map: 6 x 6 patches of 4 pixels -> avg_pool" in found.output
    found = CliRunner().invoke(app, ["info", str(folder), "--json"])
    assert json.loads(found.stdout)["vision_tower"]["layers"] is None
