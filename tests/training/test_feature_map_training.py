# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Training with a convolutional vision tower: what is frozen stays as it is, buffers too."""

import pytest
import tiny
import torch
from torch import nn

pytest.importorskip("trl")

import tiny_training
from tiny_training import arguments, conversation, run
from trl import ModelConfig, TrlParser

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.training import CacheArguments, DecoArguments, DecoSFTConfig

TOWERS = list(tiny.FEATURE_MAP_CONFIGS)
SETTINGS = {"max_steps": 3, "learning_rate": 1e-3, "train_sampling_strategy": "sequential", "seed": 1}


@pytest.fixture(scope="module", params=TOWERS)
def checkpoint(request, tmp_path_factory):
    return tiny_training.save_checkpoint(tmp_path_factory.mktemp("towers") / request.param, vision=request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    examples = [conversation(index) for index in range(6)]
    return tiny_training.save_dataset(tmp_path_factory.mktemp("towers") / "data", examples)


def tower_of(folder) -> dict[str, torch.Tensor]:
    return DecoForConditionalGeneration.from_pretrained(folder).model.vision_tower.state_dict()


def losses(trainer) -> torch.Tensor:
    return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])


def test_a_frozen_tower_is_bit_equal_after_training(checkpoint, data, tmp_path):
    before = tower_of(checkpoint)
    trainer = run(checkpoint, data, tmp_path / "run", freeze="vision_tower", attn_implementation="sdpa", **SETTINGS)
    assert trainer.state.global_step == 3
    after = tower_of(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_a_trained_tower_keeps_its_running_statistics(checkpoint, data, tmp_path):
    before = tower_of(checkpoint)
    run(checkpoint, data, tmp_path / "run", **SETTINGS)
    after = tower_of(tmp_path / "run")
    statistics = [name for name in before if "running" in name or "num_batches" in name]
    assert all(torch.equal(after[name], before[name]) for name in statistics)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert any("conv" in name for name in moved)
    assert len(moved) > len(before.keys() - statistics) / 2


def test_lora_on_the_language_model_leaves_the_tower_as_it_is(checkpoint, data, tmp_path):
    before = tower_of(checkpoint)
    settings = {"use_peft": True, "lora_target_modules": r".*language_model.*q_proj", "merge_adapter": True}
    trainer = run(checkpoint, data, tmp_path / "run", **SETTINGS, **settings)
    found = trainer.model.get_base_model().model.vision_tower.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_gradients_are_checkpointed_with_a_trained_tower(checkpoint, data, tmp_path):
    plain = run(checkpoint, data, tmp_path / "plain", **SETTINGS)
    saving = run(checkpoint, data, tmp_path / "saving", gradient_checkpointing=True, **SETTINGS)
    torch.testing.assert_close(losses(saving), losses(plain))


def test_training_on_cached_features_is_training_on_images(checkpoint, data, tmp_path):
    cache = tmp_path / "features"
    frozen = SETTINGS | {"freeze": "vision_tower", "pooled_grid_sizes": [2, 3]}
    words = arguments(checkpoint, data, "unused", feature_cache=cache, **frozen)
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig, CacheArguments))
    tiny_training.load_script("cache_features.py").main(*parser.parse_args_and_config(words))
    plain = run(checkpoint, data, tmp_path / "plain", **frozen)
    cached = run(checkpoint, data, tmp_path / "cached", feature_cache=cache, **frozen)
    torch.testing.assert_close(losses(cached), losses(plain), rtol=1e-5, atol=1e-5)
    pairs = zip(cached.model.named_parameters(), plain.model.named_parameters(), strict=True)
    for (name, found), (_, expected) in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_frozen_tower_is_in_evaluation_mode_and_a_trained_ones_normalizations_are():
    model = tiny.build_model("efficientnet").train()
    tower = model.model.vision_tower
    assert tower.training
    assert any(isinstance(module, nn.Dropout) and module.training for module in tower.modules())
    assert not any(module.training for module in tower.modules() if isinstance(module, nn.BatchNorm2d))
    assert model.model.language_model.training
    tower.requires_grad_(False)
    model.train()
    assert not any(module.training for module in tower.modules())
    assert model.model.multi_modal_projector.training
    tower.requires_grad_(True)
    assert model.train().model.vision_tower.training
    assert not any(module.training for module in model.eval().modules())
