# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Accuracy at each token budget after elastic training and after training at one grid, on the digits world.

    python recipes/digits/train.py --output_dir runs/start --num_steps 900 --plateau_step 900 \
        --tower modeling_deco/checkpoints/deco-digits --tower_learning_rate_factor 0
    python -m modeling_deco.worlds.digits.world --split train --num-pictures 16000 --seed 7 --one-record-per-picture \
        --out runs/llava
    python -m modeling_deco.training.data runs/llava/train.json --images runs/llava/images --out runs/data
    for grid in 3 6 12; do
        python recipes/sft.py --config recipes/configs/digits.yaml --model_name_or_path runs/start/final \
            --data_path runs/data --output_dir runs/fixed-$grid --pooled_grid_sizes $grid
    done
    python recipes/sft.py --config recipes/configs/digits.yaml --model_name_or_path runs/start/final \
        --data_path runs/data --output_dir runs/elastic
    python benchmarks/elastic.py runs/fixed-3 runs/fixed-6 runs/fixed-12 runs/elastic

All runs have the same start (one grid, 36 tokens), pictures, order and number of steps. The results are written to
results/elastic.json and results/elastic.png, and the last line of the output is the same JSON.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from shapes import RESULTS
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_deco  # noqa: F401  registers DeCo with the Auto classes
from modeling_deco.configuration_deco import num_image_tokens
from modeling_deco.utils.measure import command, environment, write_report
from modeling_deco.worlds.digits.evaluate import accuracy_by_kind
from modeling_deco.worlds.digits.questions import KINDS

SHOWN = ("colour", "read", "relation", "locate")  # existence and count are nearly solved at every grid


def evaluate(folder: Path, grids: list[int], num_pictures: int) -> dict[str, dict]:
    """Accuracy by grid and kind of question, in percent."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    return {str(grid): accuracy_by_kind(model, processor, "test", num_pictures, grid) for grid in grids}


def draw(results: dict[str, dict], grids: list[int], path: Path) -> None:
    """Plot accuracy against tokens per image: a panel per kind of question, a line per checkpoint."""
    figure = Figure(figsize=(3.4 * len(SHOWN), 3.6), layout="constrained")
    tokens = [num_image_tokens(grid) for grid in grids]
    for axes, kind in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN, strict=True):
        for name, accuracies in results.items():
            points = [accuracies[str(grid)][kind] for grid in grids]
            axes.errorbar(
                tokens,
                [point["accuracy"] for point in points],
                [point["standard_error"] for point in points],
                fmt="o-" if name == "elastic" else "s--",
                label=name,
                linewidth=2 if name == "elastic" else 1.2,
                markersize=4,
            )
        axes.set(title=kind, xscale="log", xticks=tokens, xticklabels=tokens, xlabel="tokens per image", ylim=(0, 101))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].legend(loc="lower center")
    figure.savefig(path, dpi=120)


def main(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Folders of checkpoints. The name of a folder is the name of its line.")
    ],
    grids: Annotated[list[int], typer.Option("--grid", help="Sides of the grids.")] = [2, 3, 4, 6, 8, 12],  # noqa: B006
    num_pictures: Annotated[
        int, typer.Option(min=2, help="Number of test pictures, each with one question of every kind.")
    ] = 500,
    out: Annotated[Path, typer.Option(help="Folder for elastic.json and elastic.png.")] = RESULTS,
) -> None:
    """Measure the accuracy of CHECKPOINTS at every grid."""
    results = {folder.name: evaluate(folder, grids, num_pictures) for folder in checkpoints}
    report = {
        "command": command(),
        "num_pictures": num_pictures,
        "accuracy": results,
        "environment": environment("cpu", "trl"),
    }
    for kind in KINDS:
        typer.echo(f"\n{kind:14}" + "".join(f"{num_image_tokens(grid):>8}" for grid in grids) + "  tokens")
        for name, accuracies in results.items():
            typer.echo(f"{name:14}" + "".join(f"{accuracies[str(grid)][kind]['accuracy']:8.1f}" for grid in grids))
    write_report(report, out / "elastic.json")
    draw(results, grids, out / "elastic.png")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
