# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiles for a model that knows one view: accuracy on pictures with small digits, at no more tokens.

    OMP_NUM_THREADS=1 python benchmarks/tiles.py

The pictures are those of the digits world at two and three times the side, with digits of the same size in pixels. In
one view of 96 x 96 pixels they are two and three times smaller than the shipped checkpoint has seen. With `tiles=4` or
`tiles=9` the vision tower sees them in tiles, whose stitched map is pooled to the same number of tokens.

Four models are asked: the shipped checkpoint as it is, after a short training on such pictures with tiles or with one
view, and after a longer training with tiles by Muon. The vision tower is frozen. Half an hour on one core. Finished
cells are kept in --runs, so the same command resumes. The results are written to results/tiles.json and tiles.png,
and the last line of the output is the same JSON.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from full_grid import (
    KEPT,
    Cells,
    Pictures,
    adamw,
    cross_entropy,
    drafted_answers,
    log,
    logits_of,
    model_inputs,
    single_turns,
    train,
    turn_of,
)
from matplotlib.figure import Figure
from shapes import RESULTS

from modeling_deco import SHIPPED_CHECKPOINT, DecoForConditionalGeneration, pool_patch_grid
from modeling_deco.configuration_deco import num_image_tokens
from modeling_deco.inference import load
from modeling_deco.utils.measure import command, environment, write_report
from modeling_deco.utils.staging import staged_file
from modeling_deco.worlds.digits.questions import KINDS, Question, questions, score
from modeling_deco.worlds.digits.scenes import IMAGE_SIZE, render
from modeling_deco.worlds.digits.tower_model import PATCH_GRID, patch_features
from modeling_deco.worlds.digits.training import build_optimizer
from modeling_deco.worlds.evaluation import summary

SCALES = (1, 2, 3)  # sides of a picture in units of 96 pixels
TILES = (1, 4, 9)
GRIDS = (12, 8, 6, 4)
FINER_GRIDS = (24, 18)  # more tokens than one view has patches, for pictures with a tile for each 96 x 96 pixels
TRAINED_GRIDS = (3, 4, 6, 12)
SHOWN = ("existence", "colour", "count", "read", "relation", "locate")
IN_TILE = "locate in tile"  # boxes as the vision tower sees them, in one tile
UNTRAINED, WITH_TILES, ONE_VIEW, LONGER = MODELS = ("untrained", "tiles", "one view", "tiles, longer")


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured."""

    pool: int = 600  # training pictures of each scale
    test: int = 150  # of each scale, each with one question of every kind
    steps: int = 300
    longer_steps: int = 600
    batch_size: int = 16


SMALL = Sizes(pool=4, test=3, steps=2, longer_steps=2, batch_size=4)


# --- pictures --------------------------------------------------------------------------------------------------------


def pixels_of(processor, images: list, tiles: int) -> torch.Tensor:
    """The views of pictures, `(pictures, tiles, 3, 96, 96)`."""
    texts = [processor.image_token] * len(images)
    pixels = processor(images=images, text=texts, tiles=tiles, return_tensors="pt")["pixel_values"]
    return pixels if pixels.ndim == 5 else pixels[:, None]


@torch.inference_mode()
def stitched(tower, pixels: torch.Tensor) -> torch.Tensor:
    """The map of patches of each picture, row by row: `(pictures, patches, width)`, from `(pictures, tiles, ...)`."""
    side = math.isqrt(pixels.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        features = patch_features(tower, pixels.flatten(0, 1))
    tiles = features.view(-1, side, side, PATCH_GRID, PATCH_GRID, features.shape[-1])
    return tiles.transpose(2, 3).flatten(1, 4).bfloat16()


def read_pictures(processor, tower, split: str, num_pictures: int, scale: int, tiles: int, grid=None) -> Pictures:
    """Render pictures with one question of every kind about each, and encode them.

    Args:
        grid: pool the features to this grid, of which the grids in training are divisors.
    """
    features, turns = [], []
    for start in range(0, num_pictures, 32):
        indices = range(start, min(start + 32, num_pictures))
        scenes = [render(split, index, seed=scale, min_digits=2, scale=scale) for index in indices]
        found = stitched(tower, pixels_of(processor, [scene.image for scene in scenes], tiles))
        if grid is not None:
            side = math.isqrt(found.shape[1])
            found = pool_patch_grid(found, (side, side), (grid, grid))
        features.append(found.clone())
        for index, scene in zip(indices, scenes, strict=True):
            asked = questions(scene, np.random.default_rng([scale, index]), KINDS)
            turns.append([turn_of(processor.tokenizer, question, question.answer) for question in asked])
    return Pictures(torch.cat(features), turns)


def pooled_map(model, features: torch.Tensor, grid: int) -> torch.Tensor:
    """DeCo: average pooling of the stitched map, then the MLP."""
    side = math.isqrt(features.shape[1])
    return model.model.multi_modal_projector(features, (side, side), (grid, grid))


def training_pool(processor, tower, sizes: Sizes, name: str, folder: Path) -> Pictures:
    """Training pictures of all scales, as the model of this name sees them: in tiles of 96 x 96 pixels or one view."""
    name = ONE_VIEW if name == ONE_VIEW else WITH_TILES
    path = folder / f"{name.replace(' ', '-')}.pt"
    if not path.exists():
        log(f"{name}: training pictures")
        parts = [
            read_pictures(
                processor, tower, "train", sizes.pool, scale, 1 if name == ONE_VIEW else scale**2, PATCH_GRID
            )
            for scale in SCALES
        ]
        features = torch.cat([part.features for part in parts])
        with staged_file(path) as incomplete:
            torch.save(Pictures(features, [turns for part in parts for turns in part.turns]), incomplete)
    return torch.load(path, weights_only=False)


# --- models ----------------------------------------------------------------------------------------------------------


def model_of(processor, tower, sizes: Sizes, name: str, seed: int, folder: Path) -> DecoForConditionalGeneration:
    """The shipped checkpoint, trained as the name says; from `folder` if it is there."""
    folder = folder / f"{name.replace(' ', '-')}-{seed}"
    if name == UNTRAINED or (folder / "config.json").exists():
        model, _ = load(SHIPPED_CHECKPOINT if name == UNTRAINED else str(folder), device="cpu", dtype="float32")
        return model
    model, _ = load(SHIPPED_CHECKPOINT, device="cpu", dtype="float32")
    model.model.vision_tower.requires_grad_(False)
    steps = sizes.longer_steps if name == LONGER else sizes.steps
    grids = np.random.default_rng(seed).choice(TRAINED_GRIDS, steps).tolist()
    losses: list[float] = []

    def loss_of(pictures: Pictures, step: int) -> torch.Tensor:
        rows = [single_turns(turns, processor.tokenizer) for turns in pictures.turns]
        inputs = model_inputs(rows, grids[step], processor, KEPT)
        loss = cross_entropy(logits_of(model, inputs, pictures.features, grids[step], pooled_map), inputs["labels"])
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            log(f"{name} {seed}: step {step + 1}, loss {np.mean(losses[-50:]):.3f}")
        return loss

    pool = training_pool(processor, tower, sizes, name, folder.parent)
    optimizer = build_optimizer(model, 0.01, 2e-3, 0) if name == LONGER else adamw(model, 1e-3)
    train(model, pool, loss_of, optimizer, steps, sizes.batch_size, seed)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def tiles_of(name: str, scale: int) -> tuple[int, ...]:
    """The numbers of tiles at which a model is asked about pictures of a scale."""
    if scale == 1 or name == ONE_VIEW:
        return (1,)
    return (scale**2,) if name == LONGER else TILES


def grids_of(scale: int, tiles: int) -> tuple[int, ...]:
    return (*FINER_GRIDS, *GRIDS) if tiles == scale**2 > 1 else GRIDS


def measure(model, processor, test: Pictures, scale: int, tiles: int) -> dict[str, dict[str, list[bool]]]:
    """By grid and kind of question, whether each answer is right."""
    side = math.isqrt(tiles) * IMAGE_SIZE

    def predict(indices: list[int], rows: list[dict], grid: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = model_inputs(rows, grid, processor, KEPT)
        inputs["image_sizes"] = torch.full((len(rows), 2), side)
        return logits_of(model, inputs, test.features[indices], grid, pooled_map), inputs["labels"]

    found: dict = {}
    for grid in grids_of(scale, tiles):
        answers = drafted_answers(test.turns, processor.tokenizer, partial(predict, grid=grid))
        right: dict = {kind: [] for kind in (*KINDS, IN_TILE)}
        for turns, texts in zip(test.turns, answers, strict=True):
            for turn, text in zip(turns, texts, strict=True):
                right[turn.question.kind].append(score(turn.question, text))
                if turn.question.box is not None:
                    right[IN_TILE].append(score(within_tile(turn.question, tiles), text))
        found[str(grid)] = right
    return found


def within_tile(question: Question, tiles: int) -> Question:
    """A question about a box with the box that the vision tower sees in one tile: that of the digit's center."""
    x0, y0, x1, y1 = (edge * math.isqrt(tiles) for edge in question.box or ())
    left, top = (IMAGE_SIZE * ((low + high) // (2 * IMAGE_SIZE)) for low, high in ((x0, x1), (y0, y1)))
    return replace(question, box=(x0 - left, y0 - top, x1 - left, y1 - top))


# --- report ----------------------------------------------------------------------------------------------------------


def over_pictures(cells: list[dict]) -> dict:
    """Accuracy and standard error over pictures by tokens and kind of question, over cells of different seeds."""
    return {
        str(num_image_tokens(int(grid))): {
            kind: summary(list(zip(*(cell[grid][kind] for cell in cells), strict=True))) for kind in cells[0][grid]
        }
        for grid in cells[0]
    }


def shown(value: dict) -> str:
    return f"{value['accuracy']:.0f} ± {value['standard_error']:.0f}"


def table(report: dict, tokens: str) -> list[list[str]]:
    """Rows of all models at a number of tokens: side of the pictures, model, tiles, then `SHOWN`."""
    return [
        [str(96 * scale), model, tiles, *(shown(by_tokens[tokens][kind]) for kind in SHOWN)]
        for scale in SCALES
        for model, by_scale in report["accuracy"].items()
        for tiles, by_tokens in by_scale.get(str(scale), {}).items()
    ]


def table_of_tokens(report: dict) -> list[list[str]]:
    """Rows where each 96 x 96 pixels have a tile: side of the pictures, model, tokens, then `SHOWN` and `IN_TILE`."""
    return [
        [str(96 * scale), model, tokens, *(shown(by_kind[kind]) for kind in (*SHOWN, IN_TILE))]
        for scale in SCALES[1:]
        for model in (UNTRAINED, WITH_TILES, LONGER)
        for tokens, by_kind in report["accuracy"].get(model, {}).get(str(scale), {}).get(str(scale**2), {}).items()
    ]


def draw(report: dict, path: Path) -> None:
    """Accuracy against tokens: a column for each model, a row for reading and one for colours."""
    rows, columns = ("read", "colour"), list(report["accuracy"])
    figure = Figure(figsize=(3.3 * len(columns), 3.1 * len(rows)), layout="constrained")
    for axes_of_row, kind in zip(figure.subplots(len(rows), len(columns), squeeze=False), rows, strict=True):
        for axes, model in zip(axes_of_row, columns, strict=True):
            for scale, by_tiles in report["accuracy"][model].items():
                for tiles, by_tokens in by_tiles.items():
                    values = [by_kind[kind] for by_kind in by_tokens.values()]
                    axes.errorbar(
                        list(map(int, by_tokens)),
                        [value["accuracy"] for value in values],
                        [value["standard_error"] for value in values],
                        fmt={"1": "s--", "4": "o-", "9": "^-"}[tiles],
                        color=f"C{scale}",
                        label=f"side {96 * int(scale)}, tiles={tiles}",
                        linewidth=1.3,
                        markersize=4,
                    )
            axes.set(title=f"{kind}, {model}", xscale="log", ylim=(0, 101), xlabel="tokens per picture")
            axes.set(xticks=(16, 36, 64, 144, 576), xticklabels=(16, 36, 64, 144, 576))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        axes_of_row[0].set_ylabel("accuracy, %")
    figure.axes[columns.index(WITH_TILES)].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(
    seeds: Annotated[list[int], typer.Option("--seed", help="Seeds of the order of pictures and grids.")] = [1],  # noqa: B006
    small: Annotated[bool, typer.Option("--small", help="A few steps and pictures, to see that it runs.")] = False,
    finished: Annotated[
        bool, typer.Option("--finished", help="Report the finished cells, and measure no more.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder for models and finished cells.")] = Path("runs/tiles"),
    out: Annotated[Path, typer.Option(help="Folder for tiles.json and tiles.png.")] = RESULTS,
) -> None:
    """Compare tiles with one view, untrained and after a short training."""
    torch.set_num_threads(1)
    sizes, cells = SMALL if small else Sizes(), Cells(runs / "cells", finished)
    shipped, processor = load(SHIPPED_CHECKPOINT, device="cpu", dtype="float32")
    tower = shipped.model.vision_tower
    models: dict = {}
    pictures: dict = {}

    def cell(name: str, seed: int, scale: int, tiles: int) -> dict:
        if (name, seed) not in models:
            models[name, seed] = model_of(processor, tower, sizes, name, seed, runs)
        if (scale, tiles) not in pictures:
            pictures[scale, tiles] = read_pictures(processor, tower, "test", sizes.test, scale, tiles)
        return measure(models[name, seed], processor, pictures[scale, tiles], scale, tiles)

    accuracy: dict = {}
    for name in MODELS:
        for scale in SCALES:
            for tiles in tiles_of(name, scale):
                found = [
                    cells.get(f"{name} {scale} {tiles} {seed}", cell, name, seed, scale, tiles)
                    for seed in (seeds if name != UNTRAINED else [0])
                ]
                found = [measured for measured in found if measured is not None]
                if found:
                    by_tiles = accuracy.setdefault(name, {}).setdefault(str(scale), {})
                    by_tiles[str(tiles)] = over_pictures(found)
    report = {
        "command": command(),
        "seeds": seeds,
        "sizes": asdict(sizes),
        "accuracy": accuracy,
        "reference_boxes": {str(scale): reference_boxes(sizes.test, scale) for scale in SCALES},
        "environment": environment("cpu"),
    }
    for row in table(report, "36") + table_of_tokens(report):
        typer.echo("".join(f"{value:>{20 if column == 1 else 10}}" for column, value in enumerate(row)))
    write_report(report, out / "tiles.json")
    draw(report, out / "tiles.png")
    typer.echo(json.dumps(report))


def reference_boxes(num_pictures: int, scale: int) -> float:
    """Percentage of the reference answers about boxes that would be right: they are rounded to 24ths of the side, too
    coarse for some small digits."""
    right = []
    for index in range(num_pictures):
        scene = render("test", index, seed=scale, min_digits=2, scale=scale)
        (question,) = questions(scene, np.random.default_rng([scale, index]), ["locate"])
        right.append(score(question, question.answer))
    return round(100 * float(np.mean(right)), 1)


if __name__ == "__main__":
    typer.run(main)
