# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pointing game: what counts as a hit, and how often the shipped checkpoint hits."""

import json

import pytest

pytest.importorskip("sklearn")

import torch
import typer
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT, DecoConfig, DecoForConditionalGeneration
from modeling_deco.worlds import pointing
from modeling_deco.worlds.digits import pointing_game as game


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((8, 16, 32, 40), [2, 3, 4], [1, 2, 3]),
        ((12, 16, 29, 29), [2, 3], [1, 2, 3]),  # its left edge on a center, which is in; 28 < 29
        ((13, 17, 28, 28), [2], [2]),  # its right and lower edges on centers, which are out
        ((90, 0, 96, 4), [], [11]),
    ],
)
def test_the_patches_whose_center_lies_in_a_box(box, rows, columns):
    inside = pointing.centers_inside(tuple(edge / 96 for edge in box), (12, 12)).view(12, 12)
    expected = torch.zeros(12, 12, dtype=torch.bool)
    for row in rows:
        expected[row, columns] = True
    assert torch.equal(inside, expected)


def test_ties_count_by_their_share_and_nothing_is_no_hit():
    inside = torch.tensor([True, True, False, False])
    assert pointing.hit(torch.tensor([0.1, 0.9, 0.5, 0.8]), inside) == 1
    assert pointing.hit(torch.tensor([0.1, 0.2, 0.5, 0.4]), inside) == 0
    assert pointing.hit(torch.tensor([0.1, 0.7, 0.7, 0.7]), inside) == pytest.approx(1 / 3)
    assert pointing.hit(torch.zeros(4), inside) == 0


def test_relevance_points_at_the_digit_that_was_asked_for(shipped):
    result = game.pointing_game(*shipped, num_pictures=20, pooled_grid_size=3)
    rates = {name: row["hit_rate"] for name, row in result.items()}
    assert rates["gae"] >= 80
    assert 20 < rates["attention"] < 50
    assert 3 < rates["chance"] < 8
    assert 0 < result["gae"]["standard_error"] < 15


def test_an_abstractor_has_no_baseline(shipped):
    model, processor = shipped
    config = DecoConfig(
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        image_token_id=model.config.image_token_id,
        pooled_grid_size=2,
        projector_type="c_abstractor",
        projector_config={"hidden_size": 16, "num_hidden_layers": 1},
    )
    result = game.pointing_game(DecoForConditionalGeneration(config).eval(), processor, 2, pooled_grid_size=2)
    assert result["attention"] is None
    assert set(result["gae"]) == {"hit_rate", "standard_error"}


def test_the_command_prints_a_table_or_json():
    app = typer.Typer()
    app.command()(game.main)
    arguments = ["--model", str(SHIPPED_CHECKPOINT), "--num-pictures", "3", "--pooled-grid-size", "3"]
    table = CliRunner().invoke(app, arguments).stdout.splitlines()
    assert [line.split()[0] for line in table] == ["hit", "gae", "attention", "chance"]
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (report["pooled_grid_size"], report["num_pictures"]) == ([3, 3], 3)
    assert f"{report['gae']['hit_rate']:.1f}" in table[1]
    assert CliRunner().invoke(app, [*arguments, "--split", "none"]).exit_code == 2
