# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the digits world, checked by their pixels."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn")

from modeling_deco.worlds.digits.scenes import COLOURS, SPLITS, render, scan_indices

NUM_SCENES = 60


@pytest.fixture(scope="module")
def scenes():
    return [render("validation", index, min_digits=2) for index in range(NUM_SCENES)]


def test_splits_share_no_scan_and_cover_all():
    splits = [set(scan_indices(split).tolist()) for split in SPLITS]
    assert set.union(*splits) == set(range(1797))
    assert sum(map(len, splits)) == 1797
    assert [len(split) for split in splits] == [1259, 179, 359]


def test_every_split_has_every_class():
    from sklearn.datasets import load_digits

    for split in SPLITS:
        assert set(load_digits().target[scan_indices(split)]) == set(range(10))


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='holdout' is not one of train, validation, test"):
        render("holdout", 0)


def test_number_of_digits_is_checked():
    with pytest.raises(ValueError, match="min_digits=3 and max_digits=2"):
        render("test", 0, min_digits=3, max_digits=2)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_a_function_of_split_seed_and_index(split):
    first, again = render(split, 7, seed=3), render(split, 7, seed=3)
    assert first.digits == again.digits
    assert first.image.tobytes() == again.image.tobytes()
    for other in (render(split, 8, seed=3), render(split, 7, seed=4)):
        assert other.image.tobytes() != first.image.tobytes()


def test_pictures_are_what_the_tower_expects(scenes):
    assert {(scene.image.size, scene.image.mode) for scene in scenes} == {((96, 96), "RGB")}


def test_classes_are_unique_and_numbers_of_digits_are_even():
    counts = Counter()
    for index in range(200):
        values = [digit.value for digit in render("validation", index).digits]
        assert len(set(values)) == len(values)
        counts[len(values)] += 1
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 30


def ink_pixels(scene):
    """Ink by its brightness: the background is at most 70."""
    return np.asarray(scene.image).max(-1) > 75


@pytest.mark.parametrize("split", ["train", "validation"])
def test_boxes_are_exactly_around_the_ink(split):
    for index in range(40):
        scene = render(split, index)
        ink, boxed = ink_pixels(scene), np.zeros((96, 96), dtype=bool)
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            inside = ink[y0:y1, x0:x1]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            boxed[y0:y1, x0:x1] = True
        assert not ink[~boxed].any()


def test_digits_keep_their_distances(scenes):
    for scene in scenes:
        claimed = np.zeros((96, 96), dtype=int)
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            claimed[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] += 1
        assert claimed.max() == 1
        centers = [(digit.box[0] + digit.box[2]) / 2 for digit in scene.digits]
        assert (np.diff(centers) >= 6).all()


def test_colour_names_match_the_pixels(scenes):
    palette = np.array(list(COLOURS.values()), dtype=float)
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=float)
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            box = pixels[y0:y1, x0:x1].reshape(-1, 3)
            brightest = box[box.max(-1) >= np.quantile(box.max(-1), 0.9)].mean(0)
            nearest = np.abs(palette - brightest).sum(-1).argmin()
            assert list(COLOURS)[nearest] == digit.colour


def test_distortions_are_for_training_only():
    digits = {split: [render(split, i).digits for i in range(60)] for split in ("train", "test")}
    heights = {
        split: [digit.box[3] - digit.box[1] for digits in found for digit in digits] for split, found in digits.items()
    }
    assert max(heights["test"]) <= 34  # a scan of 8 rows at 32 pixels, and what the spline swings over
    assert max(heights["train"]) > 36


@pytest.mark.parametrize("scale", [2, 3])
def test_larger_pictures_have_digits_of_the_same_size(scale):
    scenes = [render("validation", index, min_digits=2, scale=scale) for index in range(40)]
    assert {scene.image.size for scene in scenes} == {(scale * 96, scale * 96)}
    assert {scene.scale for scene in scenes} == {scale}
    heights = [digit.box[3] - digit.box[1] for scene in scenes for digit in scene.digits]
    assert 12 <= min(heights)
    assert max(heights) <= 34
    for scene in scenes:
        ink, boxed = np.asarray(scene.image).max(-1) > 75, np.zeros(scene.image.size, dtype=bool)
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            boxed[y0:y1, x0:x1] = True
        assert not ink[~boxed].any()
        centers = [digit.center[0] for digit in scene.digits]
        assert (np.diff(centers) >= 6 * scale).all()
    assert max(max(digit.box) for scene in scenes for digit in scene.digits) > 90 * scale
