# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The data in LLaVA's format that the command of the emoji world writes, from scenes made by hand."""

import json

import pytest

pytest.importorskip("sklearn")

from PIL import Image

from modeling_deco.worlds.emoji import world
from modeling_deco.worlds.emoji.scenes import Scene, Thing


@pytest.fixture
def rendered(monkeypatch):
    """Pictures of one dog and one cat, without art; the calls are collected."""
    calls = []

    def render(split, index, *, seed, max_things):
        calls.append((split, index, seed))
        things = Thing("dog", (0.1, 0.1, 0.3, 0.3), "red"), Thing("cat", (0.6, 0.6, 0.9, 0.9), None)
        return Scene(Image.new("RGB", (32, 32), (index, seed, 0)), things)

    class Pool:
        def __init__(self, processes):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        imap_unordered = staticmethod(map)

    monkeypatch.setattr(world, "render", render)
    monkeypatch.setattr(world, "Pool", Pool)
    monkeypatch.setattr(world, "_SHARD", 2)
    return calls


def test_questions_are_the_turns_of_one_record(rendered, tmp_path):
    world.main(["--split", "train", "--num-pictures", "5", "--out", str(tmp_path), "--seed", "3"])
    records = json.loads((tmp_path / "train.json").read_text())
    assert [record["id"] for record in records] == [f"train-3-6-{index:06d}" for index in range(5)]
    for record in records:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 8
        assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * 15
        with Image.open(tmp_path / "images" / record["image"]) as image:
            assert image.size == (32, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "train.json"]


def test_captions_are_llavas_pairs_of_stage_1(rendered, tmp_path):
    path = world.write_llava_data(tmp_path, "train", 3, with_captions=True)
    assert path.name == "train-captions.json"
    for record in json.loads(path.read_text()):
        human, gpt = record["conversations"]
        assert human == {"from": "human", "value": "<image>"}
        assert "dog" in gpt["value"]
        assert "cat" in gpt["value"]


def test_a_stopped_run_is_continued(rendered, tmp_path, monkeypatch):
    world.write_llava_data(tmp_path / "whole", "test", 5)
    rendered.clear()

    def stopped(*arguments):
        if len(rendered) == 3:
            raise KeyboardInterrupt
        return write(*arguments)

    write = world._write_picture
    monkeypatch.setattr(world, "_write_picture", stopped)
    with pytest.raises(KeyboardInterrupt):
        world.write_llava_data(tmp_path / "half", "test", 5)
    assert not (tmp_path / "half" / "test.json").exists()
    monkeypatch.setattr(world, "_write_picture", write)
    rendered.clear()
    path = world.write_llava_data(tmp_path / "half", "test", 5)
    assert [index for _, index, _ in rendered] == [2, 3, 4]
    assert path.read_bytes() == (tmp_path / "whole" / "test.json").read_bytes()
