# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The labels of the tower of the emoji world equal counted pixels, and its training resumes exactly."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from modeling_deco.worlds.emoji import tower
from modeling_deco.worlds.emoji.concepts import CONCEPTS
from modeling_deco.worlds.training_state import save_state


def test_shares_of_cells_equal_counted_pixels():
    boxes = torch.tensor([[[0.0, 0.1, 0.5, 0.4], [0.25, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    for grid in tower.GRIDS:
        shares = tower.covered_shares(boxes, grid).view(grid, grid, 3)
        side = 240 // grid
        for number, (x0, y0, x1, y1) in enumerate((240 * boxes[0]).round().int().tolist()):
            pixels = np.zeros((240, 240))
            pixels[y0:y1, x0:x1] = 1
            expected = pixels.reshape(grid, side, grid, side).mean((1, 3))
            torch.testing.assert_close(shares[..., number], torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


def test_labels_hold_every_thing_of_a_scene(drawn_art):
    scenes = [tower.render("train", index, max_things=tower.MAX_THINGS, size=128) for index in range(4)]
    batch = tower.labelled(scenes)
    names = list(CONCEPTS)
    for row, scene in enumerate(scenes):
        for column, thing in enumerate(scene.things):
            assert names[batch["concepts"][row, column]] == thing.concept
            assert batch["boxes"][row, column].tolist() == pytest.approx(thing.box)
        assert (batch["boxes"][row, len(scene.things) :] == 0).all()
    assert tower.pixel_values(batch["pixels"]).shape == (4, 3, 128, 128)


def test_the_loss_falls_where_tokens_are_the_names():
    names = torch.randn(len(CONCEPTS), 16)
    heads = tower.NameHeads(8, names, 2.0)
    feature_map = torch.randn(1, 8, 12, 12)
    things = {
        "concepts": torch.tensor([[5]]),
        "boxes": torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]),
        "colours": torch.tensor([[2]]),
    }
    with torch.no_grad():
        before = heads.loss(feature_map, things, 3)
        heads.projector.linear_2.weight.zero_()
        heads.projector.linear_2.bias.copy_(2.0 * heads.names[5])
        heads.attributes.weight.zero_()
        heads.attributes.bias.zero_()
        heads.attributes.bias[2] = 20
        heads.attributes.bias[-4:] = torch.tensor([0.0, 0.0, 1.0, 1.0])
        after = heads.loss(feature_map, things, 3)
    assert before > 3
    assert after < 0.2


def test_pictures_without_a_clear_colour_have_a_finite_loss():
    heads = tower.NameHeads(8, torch.randn(len(CONCEPTS), 16), 2.0)
    things = {
        "concepts": torch.tensor([[5]]),
        "boxes": torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]),
        "colours": torch.tensor([[-100]]),
    }
    assert heads.loss(torch.randn(1, 8, 12, 12), things, 3).isfinite()


def arguments(folder, **changes):
    fields = {"num_steps": 4, "batch_size": 2, "eval_steps": 2, "num_workers": 0, "warmup_steps": 1}
    return tower.TowerArguments(str(folder), split="test", **{**fields, **changes})


@pytest.fixture
def small(drawn_art, monkeypatch):
    """A tiny tower, tiny pictures and short evaluations in place of the real ones."""
    from transformers import EfficientNetConfig, EfficientNetModel

    config = EfficientNetConfig(
        width_coefficient=0.1, depth_coefficient=0.1, image_size=64, hidden_dim=128, dropout_rate=0.0
    )
    monkeypatch.setattr(tower, "load_efficientnet_lite0", lambda size: EfficientNetModel(config))
    monkeypatch.setattr(tower, "SIZES", (96,))
    monkeypatch.setattr(tower, "IMAGE_SIZE", 128)
    monkeypatch.setattr(tower, "GRIDS", (3,))
    monkeypatch.setattr(tower, "name_embeddings", lambda folder: (torch.eye(len(CONCEPTS)), 1.0))
    monkeypatch.setattr(tower, "smollm2_folder", lambda: "unused")
    monkeypatch.setattr(tower, "evaluate", lambda *arguments: {})


def test_a_resumed_run_equals_an_uninterrupted_one(small, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(tower, "save_tower", lambda model, folder: saved.append(model.state_dict()))
    tower.train_tower(arguments(tmp_path / "whole"))

    def save_and_stop(*state):
        save_state(*state)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(tower, "save_state", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            tower.train_tower(arguments(tmp_path / "killed"))
    tower.train_tower(arguments(tmp_path / "killed"))
    whole, resumed = saved
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    projectors = [tower.load_projector(tmp_path / name) for name in ("whole", "killed")]
    assert all(torch.equal(tensor, projectors[1][name]) for name, tensor in projectors[0].items())


def test_frozen_layers_and_statistics_stay(small, tmp_path):
    built = tower.build_tower()
    trained = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(name.startswith("embeddings.") for name in trained)
    assert not any(name.startswith(f"encoder.blocks.{block}.") for name in trained for block in range(5))
    assert not built.training
