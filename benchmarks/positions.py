# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the language model sees pooled tokens: the accuracy with `image_positions` "patch" and "sequence".

    OMP_NUM_THREADS=1 python benchmarks/positions.py

The models of the digits world were trained at the full grid of 144 tokens only. Some always saw a question right
behind its picture ("fixed" distances), and some in conversations ("varied": words before and behind the picture, and
several questions after one another). They are asked at smaller grids without any training there, and in the course
of elastic training with each numbering. About an hour on one core. Finished cells are kept in --runs, so the same
command resumes. The results are written to results/positions.json and positions.png, and the last line of the output
is the same JSON.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from full_grid import (
    DISTANCES,
    FULL,
    KEPT,
    LANGUAGE_MODELS,
    NUMBERED,
    SMALL,
    TRAINED_GRIDS,
    Cells,
    Sizes,
    World,
    accuracy,
    adamw,
    as_it_is,
    central_patches,
    cross_entropy,
    logits_of,
    model_inputs,
    num_seeds,
    over_seeds_of,
    plot,
    pooled,
    pooled_after_mlp,
    shown,
    start,
    train,
)
from matplotlib.figure import Figure
from shapes import RESULTS

from modeling_deco.configuration_deco import IMAGE_POSITIONS, num_image_tokens
from modeling_deco.utils.measure import command, environment, write_report

GRIDS = (12, 10, 8, 7, 6, 5, 4, 3, 2)  # of 12 patches on a side; windows of 10, 8, 7 and 5 differ in size, and overlap
OTHER_GRIDS = (6, 5, 4, 3)
OTHERS = {"central patch": central_patches, "pooled after the MLP": pooled_after_mlp}
CURVE_GRIDS = (6, 4, 3)
SHOWN = ("read", "locate")


# --- measurements ----------------------------------------------------------------------------------------------------


def untrained(world: World, load: Callable, other_ways: bool) -> dict:
    """Accuracy by way of making tokens, number of tokens and image positions, of a model that is not trained there."""
    model = load()
    positions_at = {grid: IMAGE_POSITIONS if grid != FULL else (NUMBERED,) for grid in GRIDS}

    def at(grids, reduce, pictures=lambda grid: world.test) -> dict:
        return {
            num_image_tokens(grid): {
                positions: accuracy(model, world.processor, pictures(grid), grid, positions, reduce)
                for positions in positions_at[grid]
            }
            for grid in grids
        }

    found = {"average pooling": at(GRIDS, pooled)}
    if other_ways:
        found |= {way: at(OTHER_GRIDS, reduce) for way, reduce in OTHERS.items()}
        found["smaller picture"] = at(OTHER_GRIDS, as_it_is, world.smaller)
    return found


def elastic(world: World, load: Callable, seed: int, distances: str, image_positions: str) -> dict:
    """Accuracy by step and number of tokens in elastic training."""
    model, rng, sizes = load(), np.random.default_rng(seed), world.sizes
    grids = rng.choice(TRAINED_GRIDS, sizes.elastic_steps).tolist()
    curve = {}

    def measure(step: int) -> None:
        if step in sizes.elastic_points:
            curve[step] = {
                num_image_tokens(grid): accuracy(model, world.processor, world.validation, grid, image_positions)
                for grid in CURVE_GRIDS
            }

    def loss_of(pictures, step):
        rows = [world.row(turns, distances, rng) for turns in pictures.turns]
        inputs = model_inputs(rows, grids[step], world.processor, image_positions)
        return cross_entropy(logits_of(model, inputs, pictures.features, grids[step]), inputs["labels"])

    measure(0)
    train(model, world.one_of_each, loss_of, adamw(model, 1e-3), sizes.elastic_steps, 16, seed, measure)
    return curve


# --- report ----------------------------------------------------------------------------------------------------------


def table(report: dict, language_model: str) -> list[list[str]]:
    """Rows of the untrained accuracy with average pooling: tokens, positions, then the shown kinds for both starts."""
    rows = []
    names = [name for name in report["untrained"] if name.startswith(language_model)]
    starts = [report["untrained"][name]["average pooling"] for name in names]
    for tokens in starts[0] if starts else ():
        for positions in starts[0][tokens]:
            found = [by_tokens[tokens][positions][kind] for by_tokens in starts for kind in SHOWN]
            rows.append([tokens, positions, *(shown(value) for value in found)])
    return rows


def table_of_ways(report: dict, name: str) -> list[list[str]]:
    """Rows of the untrained accuracy by way of making tokens: the way, positions, then `SHOWN` at `OTHER_GRIDS`."""
    ways = report["untrained"][name]
    tokens = [str(num_image_tokens(grid)) for grid in OTHER_GRIDS]
    return [
        [way, positions, *(shown(ways[way][token][positions][kind]) for kind in SHOWN for token in tokens)]
        for way, positions in product(ways, IMAGE_POSITIONS)
    ]


def table_of_training(report: dict) -> list[list[str]]:
    """Rows of the accuracy after elastic training: the start, positions, then `SHOWN` at `CURVE_GRIDS`."""
    rows = []
    for name, curve in report["elastic"].items():
        start_name, positions = name.rsplit(" ", 1)
        last = curve[max(curve, key=int)]
        rows.append([start_name, positions, *(shown(last[tokens][kind]) for kind in SHOWN for tokens in last)])
    return rows


def draw(report: dict, path: Path) -> None:
    """Above, accuracy against tokens without training at the small grids; below, against steps of elastic training."""
    names = list(report["untrained"])
    figure = Figure(figsize=(3.6 * len(names), 6.8), layout="constrained")
    above, below = figure.subplots(2, len(names), sharey=True, squeeze=False)
    lines = {KEPT: "o-", NUMBERED: "s--"}
    colours = {kind: f"C{index}" for index, kind in enumerate(SHOWN)}
    for axes, name in zip(above, names, strict=True):
        by_tokens = report["untrained"][name]["average pooling"]
        for (positions, line), kind in product(lines.items(), SHOWN):
            points = [by_tokens[tokens].get(positions, by_tokens[tokens][NUMBERED])[kind] for tokens in by_tokens]
            plot(axes, list(map(int, by_tokens)), points, line, colours[kind], f"{kind}, {positions}")
        axes.set(title=f"{name} distances, untrained", xscale="log", xlabel="tokens per picture", ylim=(0, 101))
        axes.set(xticks=list(map(int, by_tokens)), xticklabels=list(by_tokens))
        axes.minorticks_off()
    for axes, name in zip(below, names, strict=True):
        for (positions, line), (tokens, colour) in product(lines.items(), {"36": "C2", "16": "C3", "9": "C4"}.items()):
            curve = report["elastic"].get(f"{name} {positions}")
            if curve is None:
                continue
            points = [curve[step][tokens]["read"] for step in curve]
            plot(axes, list(map(int, curve)), points, line, colour, f"{tokens} tokens, {positions}")
        axes.set(title="read, in elastic training", xlabel="step")
    for row in (above, below):
        row[0].set_ylabel("accuracy, %")
        row[-1].legend(fontsize=8, loc="lower right")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(
    seeds: Annotated[list[int], typer.Option("--seed", help="Seeds of weights, pictures and grids.")] = [1, 2, 3],  # noqa: B006
    language_models: Annotated[
        list[str], typer.Option("--language-model", help=f"Any of {', '.join(LANGUAGE_MODELS)}.")
    ] = list(LANGUAGE_MODELS),  # noqa: B006
    small: Annotated[bool, typer.Option("--small", help="A few steps and pictures, to see that it runs.")] = False,
    finished: Annotated[
        bool, typer.Option("--finished", help="Report the finished cells, and measure no more.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder for starts and finished cells.")] = Path("runs/positions"),
    out: Annotated[Path, typer.Option(help="Folder for positions.json and positions.png.")] = RESULTS,
) -> None:
    """Compare the two image positions, untrained and in elastic training."""
    torch.set_num_threads(1)
    sizes = SMALL if small else Sizes()
    world, cells = None if finished else World(runs, sizes), Cells(runs / "cells", finished)
    measured: dict = {"untrained": {}, "elastic": {}}
    for seed, language_model, distances in product(seeds, language_models, DISTANCES):
        name = f"{language_model} {distances}"
        load = partial(start, world, language_model, distances, seed)
        cell = f"{name} {seed}"
        measured["untrained"][cell] = cells.get(f"untrained {cell}", untrained, world, load, language_model == "llama")
        for positions in IMAGE_POSITIONS:
            cell = f"{name} {positions} {seed}"
            measured["elastic"][cell] = cells.get(f"elastic {cell}", elastic, world, load, seed, distances, positions)
    report = {
        "command": command(),
        "seeds": {kind: num_seeds(found) for kind, found in measured.items()},
        "sizes": asdict(sizes),
        **{kind: over_seeds_of(found) for kind, found in measured.items()},
        "environment": environment("cpu"),
    }
    for language_model in language_models:
        typer.echo(f"\n{language_model}")
        for row in table(report, language_model):
            typer.echo("".join(f"{cell:>12}" for cell in row))
    write_report(report, out / "positions.json")
    draw(report, out / "positions.png")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
