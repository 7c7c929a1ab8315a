# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The data in LLaVA's format that the command of the digits world writes."""

import json

import pytest

pytest.importorskip("sklearn")

from PIL import Image

from modeling_deco.worlds.digits import world
from modeling_deco.worlds.digits.scenes import render


def test_llava_data_is_written(tmp_path):
    world.main(["--split", "test", "--num-pictures", "3", "--out", str(tmp_path), "--min-digits", "2"])
    records = json.loads((tmp_path / "test.json").read_text())
    assert len({record["id"] for record in records}) == len(records)
    assert len({record["image"] for record in records}) == 3
    for record in records:
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n")
        assert human["value"].count("<image>") == 1
        with Image.open(tmp_path / "images" / record["image"]) as image:
            assert image.size == (96, 96)
    first = Image.open(tmp_path / "images" / "test-0-000000.png").tobytes()
    assert first == render("test", 0, min_digits=2).image.tobytes()


def test_conversations_have_up_to_max_turns_in_random_order(tmp_path):
    path = world.write_llava_data(tmp_path, "train", 60, 5, 1, one_record_per_picture=True, max_turns=3)
    conversations = [record["conversations"] for record in json.loads(path.read_text())]
    assert len(conversations) == 60
    assert {len(turns) for turns in conversations} == {2, 4, 6}
    assert all(
        [turn["value"].startswith("<image>") for turn in turns] == [True] + [False] * (len(turns) - 1)
        for turns in conversations
    )
    starts = {turns[0]["value"].split()[1] for turns in conversations}
    assert starts >= {"Is", "What", "Where", "Read"}


@pytest.mark.parametrize("max_turns", ["0", "12"])
def test_an_impossible_number_of_turns_is_an_error(max_turns, tmp_path, capsys):
    with pytest.raises(SystemExit):
        world.main(
            ["--split", "train", "--num-pictures", "1", "--out", str(tmp_path / "out"), "--max-turns", max_turns]
        )
    assert f"--max-turns must be 1 to 11, got {max_turns}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
