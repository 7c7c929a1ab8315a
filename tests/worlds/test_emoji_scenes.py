# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Scenes of the emoji world, with icons that the tests draw themselves."""

import numpy as np
import pytest
from PIL import Image

from modeling_deco.utils.errors import InputError
from modeling_deco.worlds.emoji import art, scenes
from modeling_deco.worlds.emoji.concepts import CONCEPTS


def test_the_concepts_are_300_with_different_names():
    assert len(CONCEPTS) == 300
    assert all(concept.article in ("a", "an", "") and concept.icons for concept in CONCEPTS.values())
    assert CONCEPTS["umbrella"].with_article == "an umbrella"
    assert CONCEPTS["scissors"].with_article == "scissors"


def test_no_set_is_in_two_splits():
    sets = [name for names in art.SETS.values() for name in names]
    assert len(sets) == len(set(sets))


def test_a_scene_depends_on_its_arguments_alone(drawn_art):
    scene, again, other = (scenes.render("test", index, seed=3) for index in (5, 5, 6))
    assert scene.image.tobytes() == again.image.tobytes()
    assert scene.things == again.things
    assert scene.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_things_do_not_overlap_and_are_inside(drawn_art, split):
    for index in range(10):
        things = scenes.render(split, index).things
        assert 1 <= len(things) <= 6
        for number, thing in enumerate(things):
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
            assert not any(scenes._overlap(thing.box, other.box) for other in things[:number])


def test_the_box_is_where_the_ink_is(drawn_art, monkeypatch):
    white = Image.new("RGB", (384, 384), "white")
    monkeypatch.setattr(scenes, "_background", lambda *arguments: white.copy())
    scene = scenes.single("test", "apple", 0)
    differs = np.abs(np.asarray(scene.image).astype(int) - 255).sum(-1) > 200
    rows, columns = np.nonzero(differs)
    expected = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 384
    assert np.abs(np.array(scene.things[0].box) - expected).max() <= 2 / 384


def test_things_can_be_repeated(drawn_art):
    counts = [len(scene.things) - len({t.concept for t in scene.things}) for scene in map_scenes(40)]
    assert max(counts) > 1
    assert min(counts) == 0


def map_scenes(number):
    return [scenes.render("train", index) for index in range(number)]


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"split='fluent' is not one of train, validation, test, openmoji, tuxpaint"):
        scenes.render("fluent", 0)


def test_missing_art_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(art, "art_folder", lambda: tmp_path / "none")
    with pytest.raises(InputError, match=r"does not exist; run 'python -m modeling_deco\.worlds\.emoji\.art'"):
        art.icon("noto", "dog")


def test_another_file_than_iconifys_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(art, "art_folder", lambda: tmp_path / "art")
    (tmp_path / "other.tgz").write_bytes(b"other")
    with pytest.raises(InputError, match="its SHA-512 differs"):
        art.fetch(tmp_path / "other.tgz")
    with pytest.raises(InputError, match="is not a file"):
        art.fetch(tmp_path / "none.tgz")
    assert not (tmp_path / "art").exists()


def test_stamps_are_copied_once_they_are_all_there(tmp_path, monkeypatch):
    monkeypatch.setattr(art, "art_folder", lambda: tmp_path / "art")
    monkeypatch.setattr(art, "_stamps", lambda: {"animals/dog": "dog", "food/pear": "pear"})
    (tmp_path / "art").mkdir()
    stamps = tmp_path / "stamps"
    for name in ("animals/dog", "food/pear"):
        with pytest.raises(InputError, match=f"has no {name}.png; install tuxpaint-stamps-default"):
            art.fetch_stamps(stamps)
        (stamps / name).parent.mkdir(parents=True)
        Image.new("RGB", (500, 250), "red").save(stamps / f"{name}.png")
    folder = art.fetch_stamps(stamps)
    assert sorted(path.name for path in folder.iterdir()) == ["animals-dog.png", "food-pear.png"]
    with Image.open(folder / "food-pear.png") as image:
        assert (image.mode, image.size) == ("RGBA", (224, 112))


def test_every_stamp_shows_a_concept():
    assert set(art._stamps().values()) <= set(CONCEPTS)


def test_aliases_of_icons_are_followed_and_mirrored():
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"right": {"body": "<path d='M0 0'/>"}},
        "aliases": {"left": {"parent": "right", "hFlip": True}},
    }
    assert 'viewBox="0 0 32 32"' in art._svg(icons, "right")
    assert "matrix(-1 0 0 1 32 0)" in art._svg(icons, "left")


@pytest.mark.parametrize(("split", "needs"), [("train", "npm, or --iconify"), ("tuxpaint", "--tuxpaint")])
def test_a_scene_without_art_says_what_to_run(tmp_path, monkeypatch, split, needs):
    monkeypatch.setattr(art, "art_folder", lambda: tmp_path / "none")
    art.concepts_of.cache_clear()
    with pytest.raises(InputError, match=rf"run 'python -m modeling_deco\.worlds\.emoji\.art', which needs {needs}"):
        scenes.render(split, 0)
