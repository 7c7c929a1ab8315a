# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco budgets`: tables or JSON on stdout, a figure on demand, one line on stderr for bad input."""

import json
import re
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.cli import app
from modeling_deco.inference import budgets as module
from modeling_deco.worlds.digits.scenes import render

KINDS = {"read": ["Read the digits."], "existence": [f"Is there a {value}?" for value in range(10)]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with six pictures and a broken one, and a file of questions."""
    folder = tmp_path_factory.mktemp("world")
    pictures, questions = folder / "pictures", folder / "questions.json"
    pictures.mkdir()
    for index in range(6):
        render("test", index=index, seed=3, min_digits=2).image.save(pictures / f"{index}.png")
    (pictures / "broken.png").write_bytes(b"not a picture")
    questions.write_text(json.dumps(KINDS))
    return str(pictures), str(questions)


def budgets(*arguments, model=SHIPPED_CHECKPOINT):
    return CliRunner().invoke(app, ["budgets", str(model), *arguments])


def test_json_has_every_grid_and_what_was_used(world):
    pictures, questions = world
    result = budgets(pictures, "--questions", questions, "--grids", "6,1,3x4", "--target", "50%", "--json")
    assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
    assert "1 of 7 pictures cannot be read and are left out: " in result.stderr
    assert "broken.png" in result.stderr
    report = json.loads(result.stdout)
    assert [row["pooled_grid_size"] for row in report["grids"]] == [[1, 1], [3, 4], [6, 6], [12, 12]]
    assert [row["num_image_tokens"] for row in report["grids"]] == [1, 12, 36, 144]
    assert (report["num_pictures"], report["num_answers"], report["target"]) == (6, 12, 0.5)
    assert len(report["unreadable"]) == 1
    one, _, six, full = report["grids"]
    assert one["agreement_by_kind"]["read"]["share"] < 0.5 < six["agreement_by_kind"]["read"]["share"]
    assert report["smallest_grid"] in ([3, 4], [6, 6])
    assert full["kv_cache_bytes"] == 144 * one["kv_cache_bytes"]
    assert full["first_token_seconds"]["median"] > report["vision_tower_seconds"] > 0
    assert {"device", "threads", "torch", "transformers"} <= report["environment"].keys()
    assert (report["seed"], report["max_new_tokens"], report["batch_size"]) == (0, 64, 16)


def test_tables_and_a_figure_say_what_was_found_and_what_it_is_not(world, tmp_path):
    pictures, questions = world
    plot = tmp_path / "budgets.png"
    result = budgets(pictures, "--questions", questions, "--grids", "1,6", "--limit", "3", "--plot", str(plot))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert re.match(r"[46] answers about [23] pictures at each grid, compared with those at 12 x 12", lines[0])
    assert [line.split("  ")[0] for line in lines[2:6]] == ["grid", "1 x 1", "6 x 6", "12 x 12"]
    assert [line.split("  ")[0] for line in lines[7:10]] == ["equal answers, %", "read", "existence"]
    assert "No grid below 12 x 12 meets 99 % with these pictures." in lines
    assert "a model that is always wrong agrees with itself" in result.stdout
    assert max(map(len, lines)) < 120
    with Image.open(plot) as figure:
        assert figure.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["budgets.png"]


def test_the_smallest_grid_that_meets_the_target_is_named(world):
    pictures, questions = world
    result = budgets(pictures, "--questions", questions, "--grids", "1,6", "--target", "50%")
    assert "The smallest grid that meets 50 % is 6 x 6, with 4 times fewer tokens." in result.stdout


def test_the_pictures_that_are_missing_are_counted(world, tmp_path):
    """With all answers equal, 6 pictures are too few for 99 %. A text file has no kinds."""
    questions = tmp_path / "questions.txt"
    questions.write_text("How many digits are there?")
    result = budgets(world[0], "--questions", str(questions), "--grids", "6")
    assert "6 x 6 with 381 (375 more)." in result.stdout
    assert "equal answers, %" not in result.stdout


def test_the_rows_of_a_data_set_are_pictures_too(world, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / "cache")
    images = [f"{world[0]}/{name}.png" for name in (0, 1, 2)]
    column = {"image": [{"path": None, "bytes": Path(image).read_bytes()} for image in images]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(column, features).to_parquet(tmp_path / "data.parquet")
    for source in (tmp_path, tmp_path / "data.parquet"):
        result = budgets(str(source), "--questions", world[1], "--grids", "6", "--json")
        report = json.loads(result.stdout)
        assert (report["num_pictures"], report["unreadable"]) == (3, {})
    alone = json.loads(budgets(*images, "--questions", world[1], "--grids", "6", "--json").stdout)
    assert alone["grids"][0]["agreement"] == report["grids"][0]["agreement"]
    result = budgets(str(tmp_path), "--split", "test")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"deco budgets: .*test.*\n", result.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grids", "13"], "--grids=[13, 13]: 13 x 13 is larger than the 12 x 12 patches of the vision tower"),
        (["--grids", "3,x"], "The pooled grid size 'x' is neither a number (8) nor ROWSxCOLS (8x12)."),
        (["--target", "100%"], "The target '100%' is not between 0% and 100%."),
        (["--questions", "missing.txt"], "The questions 'missing.txt' cannot be read: No such file"),
        (["--plot", "budgets.pdf"], "--plot writes a PNG file; 'budgets.pdf' does not end in .png."),
        (["--plot", "missing/budgets.png"], "--plot: there is no folder 'missing' that can be written to."),
    ],
)
def test_bad_input_is_one_line(options, message, world):
    result = budgets(world[0], *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"deco budgets: {message}")
    assert result.stderr.count("\n") == 1


def test_pictures_that_are_not_there_are_one_line(world, tmp_path):
    result = budgets("missing.png", "--questions", world[1])
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        "None of 1 pictures can be read; the first: The image 'missing.png' cannot be read: there is no such"
        in result.stderr
    )
    result = budgets(str(tmp_path))
    assert result.stderr == f"deco budgets: The folder {str(tmp_path)!r} has no pictures.\n"


def test_a_model_with_one_grid_is_one_line(world, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny.build_config(projector_type="resampler", projector_config=sizes).save_pretrained(tmp_path)
    result = budgets(world[0], model=tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "deco budgets: The projector 'resampler' has one grid only, 3 x 3; there is nothing to compare.\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "deco budgets: stopped before the end, so there is nothing to show.\n"),
        (
            torch.OutOfMemoryError("CUDA"),
            1,
            "deco budgets: out of memory. Choose a smaller --batch-size, or --4bit.\n",
        ),
    ],
)
def test_what_ends_a_run_leaves_one_line_and_no_figure(error, code, line, world, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(module.GridAnswers, "answer", fail)
    result = budgets(world[0], "--questions", world[1], "--plot", str(tmp_path / "budgets.png"))
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", line)
    assert list(tmp_path.iterdir()) == []
