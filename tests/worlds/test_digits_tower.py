# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The labels of the tower equal counted pixels, and its training resumes exactly."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from transformers import CLIPImageProcessor, CLIPVisionModel, set_seed

from modeling_deco.worlds.digits import tower, tower_heads, tower_labels, tower_model
from modeling_deco.worlds.digits.scenes import render


@pytest.fixture(scope="module")
def scenes():
    return [render("train", index, min_digits=2) for index in range(20)]


@pytest.fixture(scope="module")
def boxes(scenes):
    return torch.stack([tower_labels.scene_labels(scene)["boxes"] for scene in scenes])


def class_map(scene):
    """Class of each pixel, by the boxes: `(96, 96)`, -1 outside of them."""
    pixels = np.full((96, 96), -1)
    for digit in scene.digits:
        x0, y0, x1, y1 = digit.box
        pixels[y0:y1, x0:x1] = digit.value
    return pixels


def test_patch_labels_equal_counted_pixels(scenes, boxes):
    labels = tower_labels.patch_digits(boxes).view(-1, 12, 12)
    for scene, label in zip(scenes, labels, strict=True):
        pixels = class_map(scene)
        for row in range(12):
            for column in range(12):
                patch = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].ravel()
                counts = np.bincount(patch[patch >= 0], minlength=10)
                expected = 10 if counts.max() == 0 else -100 if counts.max() < 16 else counts.argmax()
                if counts.max() == 0 or (counts == counts.max()).sum() == 1:
                    assert label[row, column] == expected


@pytest.mark.parametrize("grid", tower_heads.POOLED_GRIDS)
def test_cell_labels_equal_counted_pixels(grid, scenes, boxes):
    side = 96 // grid
    present, known = (mask.view(-1, grid, grid, 10) for mask in tower_labels.cell_presence(boxes, grid))
    for picture, scene in enumerate(scenes):
        pixels = class_map(scene)
        for value in range(10):
            counts = (pixels == value).reshape(grid, side, grid, side).sum((1, 3))
            found = present[picture, ..., value].numpy()
            expected = (counts > 0) & ((counts >= counts.sum() / 6) | (counts == counts.max()))
            assert (found == expected).all()
            assert (known[picture, ..., value].numpy() == (found | (counts == 0))).all()


def test_pixel_values_are_those_of_the_image_processor(scenes):
    processor = CLIPImageProcessor(
        do_resize=False, do_center_crop=False, image_mean=tower_model.IMAGE_MEAN, image_std=tower_model.IMAGE_STD
    )
    expected = processor(scenes[0].image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(tower_model.pixel_values(scenes[0]), expected)


def test_positions_are_distinct_and_separable():
    positions = tower_model.sincos_positions(12, 128).view(12, 12, 128)
    assert (positions[3, :, :64] == positions[3, :1, :64]).all()
    assert (positions[:, 5, 64:] == positions[:1, 5, 64:]).all()
    assert torch.cdist(positions.flatten(0, 1), positions.flatten(0, 1)).fill_diagonal_(1).min() > 0.1


def test_a_perfect_readout_scores_a_hundred(scenes, boxes):
    """`evaluate` on heads that return the labels."""
    labels = torch.stack([tower_labels.scene_labels(scene)["colours"] for scene in scenes])

    class Oracle(tower_heads.DenseHeads):
        def read_patches(self, features):
            digits = tower_labels.patch_digits(boxes).clamp(min=0)
            return torch.nn.functional.one_hot(digits, 11).float(), None, None

        def read_pooled(self, features, grid):
            present, _ = tower_labels.cell_presence(boxes, grid)
            colours = torch.nn.functional.one_hot(labels.clamp(min=0), 6).float()
            cells = (-1, grid * grid, -1, -1)
            return present.float() * 2 - 1, colours[:, None].expand(cells), (boxes / 96)[:, None].expand(cells)

    batch = {
        "pixel_values": torch.stack([tower_model.pixel_values(scene) for scene in scenes]),
        "boxes": boxes,
        "colours": labels,
    }
    metrics = tower_heads.evaluate(tower_model.build_tower(), Oracle(), [batch])
    assert set(metrics.values()) == {100.0}


def test_interrupted_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    options = {"num_steps": 4, "batch_size": 2, "warmup_steps": 2, "eval_steps": 2, "num_eval_pictures": 2}
    whole = tower.TowerArguments(output_dir=str(tmp_path / "whole"), num_workers=0, **options)
    tower.train_tower(whole)

    def save_and_stop(path, step, parts):
        save_state(path, step, parts)
        raise KeyboardInterrupt

    save_state = tower.save_state
    parted = tower.TowerArguments(output_dir=str(tmp_path / "parted"), num_workers=0, **options)
    monkeypatch.setattr(tower, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        tower.train_tower(parted)
    monkeypatch.setattr(tower, "save_state", save_state)
    tower.train_tower(parted)

    loaded = [CLIPVisionModel.from_pretrained(args.output_dir).state_dict() for args in (whole, parted)]
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])
    set_seed(whole.seed)
    initial = tower_model.build_tower().state_dict()
    moved = [name for name in initial if not torch.equal(initial[name], loaded[0][name])]
    assert len(moved) == len([name for name in initial if not name.startswith("post_layernorm")])
