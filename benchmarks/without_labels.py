# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Accuracy at small grids after tuning without labels: a model learns its own answers at the full grid.

    OMP_NUM_THREADS=1 python benchmarks/positions.py
    OMP_NUM_THREADS=1 python benchmarks/without_labels.py

It starts from the Llamas of the first command, which were trained at the full grid of 144 tokens only. They are tuned
on their own greedy answers or on true labels, with either numbering, on 32 to 1600 pictures with one question of
every kind; on the teacher's logits (KL) on the fewest pictures; and with LoRA on the most. About half an hour on one
core. Finished cells are kept in --runs, so the same command resumes. The results are written to
results/without_labels.json and without_labels.png, and the last line of the output is the same JSON.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from full_grid import (
    DISTANCES,
    FULL,
    KEPT,
    NUMBERED,
    SMALL,
    TRAINED_GRIDS,
    Cells,
    Pictures,
    Sizes,
    World,
    accuracy,
    accuracy_of,
    adamw,
    cross_entropy,
    greedy_answers,
    logits_of,
    model_inputs,
    num_seeds,
    over_seeds_of,
    plot,
    shown,
    start,
    train,
    turn_of,
)
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from shapes import RESULTS
from torch import nn

from modeling_deco.configuration_deco import IMAGE_POSITIONS, num_image_tokens
from modeling_deco.training.collator import IGNORE_INDEX
from modeling_deco.utils.measure import command, environment, write_report

GRIDS = (6, 4, 3, 2)
SHOWN = ("read", "locate")
TARGETS = ("own answers", "labels")


class Tuning(NamedTuple):
    """What a model is tuned on, and how."""

    target: str
    positions: str
    num_pictures: int
    lora: bool = False

    @property
    def name(self) -> str:
        return f"{self.target}{' LoRA' * self.lora} {self.positions} {self.num_pictures}"


def planned(sizes: Sizes) -> list[Tuning]:
    return [
        *(Tuning(*choice) for choice in product(TARGETS, IMAGE_POSITIONS, sizes.num_pictures)),
        Tuning("teacher's logits", KEPT, min(sizes.num_pictures)),
        Tuning("own answers", KEPT, max(sizes.num_pictures), lora=True),
    ]


# --- measurements ----------------------------------------------------------------------------------------------------


def teacher(world: World, load: Callable) -> dict:
    """The answers at the full grid to the training questions, how many of them are right, and the accuracy before any
    tuning."""
    model, pictures = load(), world.one_of_each.take(range(max(world.sizes.num_pictures)))
    answers = greedy_answers(model, world.processor, pictures, FULL, NUMBERED)
    return {
        "answers": answers,
        "right": accuracy_of(pictures, answers),
        "full grid": accuracy(model, world.processor, world.test, FULL, NUMBERED),
        "untrained": {positions: by_tokens(world, model, world.test, positions) for positions in IMAGE_POSITIONS},
    }


def by_tokens(world: World, model, pictures: Pictures, positions: str, grids=GRIDS) -> dict:
    return {num_image_tokens(grid): accuracy(model, world.processor, pictures, grid, positions) for grid in grids}


def tuned(world: World, load: Callable, answers: list[list[str]], distances: str, seed: int, tuning: Tuning) -> dict:
    """Accuracy on test pictures after tuning, and on validation pictures by step."""
    torch.manual_seed(seed)
    model, rng, sizes = load(), np.random.default_rng(seed), world.sizes
    teacher = copy.deepcopy(model).eval() if tuning.target == "teacher's logits" else None
    pictures = world.one_of_each.take(range(tuning.num_pictures))
    if tuning.target != "labels":
        for turns, texts in zip(pictures.turns, answers, strict=False):
            turns[:] = [
                turn_of(world.processor.tokenizer, turn.question, text)
                for turn, text in zip(turns, texts, strict=True)
            ]
    if tuning.lora:
        add_lora(model)
    grids, curve = rng.choice(TRAINED_GRIDS, sizes.tuning_steps).tolist(), {}

    def loss_of(batch: Pictures, step: int) -> torch.Tensor:
        grid, rows = grids[step], [world.row(turns, distances, rng) for turns in batch.turns]
        inputs = model_inputs(rows, grid, world.processor, tuning.positions)
        logits = logits_of(model, inputs, batch.features, grid)
        if teacher is None:
            return cross_entropy(logits, inputs["labels"])
        full = model_inputs(rows, FULL, world.processor, NUMBERED)
        with torch.no_grad():
            targets = logits_of(teacher, full, batch.features, FULL)
        return kl_divergence(before_answers(logits, inputs["labels"]), before_answers(targets, full["labels"]))

    def measure(step: int) -> None:
        if step in sizes.tuning_points:
            curve[step] = by_tokens(world, model, world.validation, tuning.positions, (4, 3))

    train(model, pictures, loss_of, adamw(model, 2e-3 if tuning.lora else 1e-3), sizes.tuning_steps, 16, seed, measure)
    return {"test": by_tokens(world, model, world.test, tuning.positions, (FULL, *GRIDS)), "curve": curve}


def before_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(tokens, vocabulary)`: the logits of all tokens that are learned, in the same order at every grid."""
    return logits[:, :-1][labels[:, 1:] != IGNORE_INDEX]


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the student from the teacher, mean over tokens."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def add_lora(model) -> None:
    """Train adapters of the language model and the whole projector, as recipes/configs/tune_without_labels.yaml."""
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    get_peft_model(model, config)  # changes the model itself


# --- report ----------------------------------------------------------------------------------------------------------


def draw(report: dict, path: Path) -> None:
    """Accuracy at 9 tokens by number of pictures: a column per start, a row per kind of question."""
    figure = Figure(figsize=(4.6 * len(DISTANCES), 3.3 * len(SHOWN)), layout="constrained")
    grid = figure.subplots(len(SHOWN), len(DISTANCES), sharey="row", sharex=True, squeeze=False)
    sizes = report["sizes"]["num_pictures"]
    for row, kind in zip(grid, SHOWN, strict=True):
        for axes, distances in zip(row, DISTANCES, strict=True):
            first, found = report["teacher"][distances], report["tuned"][distances]
            axes.axhline(first["full grid"][kind]["mean"], color="0.5", linestyle=":", label="teacher, 144 tokens")
            for (target, colour), (positions, line) in product(
                zip(TARGETS, ("C0", "C1"), strict=True), {KEPT: "o-", NUMBERED: "s--"}.items()
            ):
                points = {0: first["untrained"][positions]["9"][kind]}
                for place, size in enumerate(sizes, start=1):
                    cell = found.get(Tuning(target, positions, size).name)
                    points |= {place: cell["test"]["9"][kind]} if cell else {}
                plot(axes, list(points), list(points.values()), line, colour, f"{target}, {positions}")
            axes.set(title=f"{kind}, 9 tokens, {distances} distances", ylim=(0, 101))
            axes.set(xticks=range(len(sizes) + 1), xticklabels=["untrained", *sizes])
            axes.grid(alpha=0.3)
        row[0].set_ylabel("accuracy, %")
    for axes in grid[-1]:
        axes.set_xlabel("pictures")
    grid[0, -1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def table(report: dict, distances: str) -> list[list[str]]:
    """Rows for one kind of start: what was tuned, then `SHOWN` at 36, 16, 9 and 4 tokens."""
    first, found = report["teacher"][distances], report["tuned"][distances]
    rows = [[f"untrained, {positions}", "", first["untrained"][positions]] for positions in IMAGE_POSITIONS]
    for name, tuned in found.items():
        words, positions, num_pictures = name.rsplit(" ", 2)
        rows.append([f"{words}, {positions}", num_pictures, tuned["test"]])
    tokens = [str(num_image_tokens(grid)) for grid in GRIDS]
    return [[*names, *(shown(at[token][kind]) for kind in SHOWN for token in tokens)] for *names, at in rows]


def main(
    seeds: Annotated[list[int], typer.Option("--seed", help="Seeds of the starts, pictures and grids.")] = [1, 2, 3],  # noqa: B006
    small: Annotated[bool, typer.Option("--small", help="A few steps and pictures, to see that it runs.")] = False,
    finished: Annotated[
        bool, typer.Option("--finished", help="Report the finished cells, and measure no more.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder for starts and finished cells.")] = Path("runs/positions"),
    out: Annotated[Path, typer.Option(help="Folder for without_labels.json and without_labels.png.")] = RESULTS,
) -> None:
    """Compare tuning on a model's own answers with tuning on labels."""
    torch.set_num_threads(1)
    sizes = SMALL if small else Sizes()
    world, cells = None if finished else World(runs, sizes), Cells(runs / "cells", finished)
    teachers: dict = {}
    results: dict = {distances: {} for distances in DISTANCES}
    for seed, distances in product(seeds, DISTANCES):
        load = partial(start, world, "llama", distances, seed)
        first = cells.get(f"teacher {distances} {seed}", teacher, world, load)
        answers = None if first is None else first.pop("answers")
        teachers[f"{distances} {seed}"] = first
        for tuning in planned(sizes):
            name = f"tuned {distances} {tuning.name} {seed}"
            cell = cells.get(name, tuned, world, load, answers, distances, seed, tuning)
            results[distances][f"{tuning.name} {seed}"] = cell
    report = {
        "command": command(),
        "seeds": {distances: num_seeds(found) for distances, found in results.items()},
        "sizes": asdict(sizes),
        "teacher": over_seeds_of(teachers),
        "tuned": {distances: over_seeds_of(found) for distances, found in results.items()},
        "environment": environment("cpu", "peft"),
    }
    for distances in DISTANCES:
        typer.echo(f"\n{distances} distances")
        for name, num_pictures, *values in table(report, distances):
            typer.echo(f"{name:28}{num_pictures:>6}" + "".join(f"{value:>10}" for value in values))
    write_report(report, out / "without_labels.json")
    draw(report, out / "without_labels.png")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
