# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pointing game: does the most relevant patch for a colour word lie in the digit that was asked about?

    python -m modeling_deco.worlds.digits.pointing_game --model DIR --pooled-grid-size 6 [--json]

Each picture has at least two digits and one question about a colour. The model gets the right answer ("7 red."), and
GAE and raw attention explain its colour word. A hit means that the center of the most relevant patch lies in the box
of the digit. If several patches share the maximum, as with raw attention in a pooled cell, the hit counts as the share
of them that lies in the box. Chance is the share of all patches whose center lies in the box.
"""

import json
import sys
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm.auto import tqdm

from ...configuration_deco import parse_grid
from ...inference.loading import load
from ...relevance import explain
from ...relevance.explain import METHODS
from ...utils.measure import environment
from ...utils.script import run
from .questions import questions
from .scenes import IMAGE_SIZE, SPLITS, Box, render

ABSTRACTORS = ("c_abstractor", "d_abstractor")  # projectors without attention to patches


def pointing_game(
    model, processor, num_pictures: int, pooled_grid_size=None, split="test", seed=0, min_digits=2, max_digits=4
) -> dict[str, dict[str, float] | None]:
    """Play the pointing game with one question about each picture.

    Args:
        pooled_grid_size: the token budget. Default: the processor's.
        split: the scans to use.
        min_digits, max_digits: number of digits in a picture.

    Returns:
        `hit_rate` and `standard_error` (over pictures) in percent, for `"gae"`, `"attention"` and `"chance"`.
        `"attention"` is None for abstractors.
    """
    methods = [method for method in METHODS if method == "gae" or model.config.projector_type not in ABSTRACTORS]
    rates: dict[str, list] = {name: [] for name in (*methods, "chance")}
    for index in tqdm(range(num_pictures), desc="pointing game", unit="picture", disable=None, file=sys.stderr):
        scene = render(split, index, seed=seed, min_digits=min_digits, max_digits=max_digits)
        (question,) = questions(scene, np.random.default_rng(index), ["colour"])
        (digit,) = (digit for digit in scene.digits if question.answer.startswith(str(digit.value)))
        for method in methods:
            relevance = explain(
                model, processor, scene.image, question.text, question.answer, pooled_grid_size, method
            ).average([digit.colour])
            is_inside = centers_inside(digit.box, relevance.patch_grid)
            rates[method].append(hit(relevance.text_to_patch[0], is_inside))
        rates["chance"].append(is_inside.float().mean().item())
    return {name: _summary(rates[name]) if name in rates else None for name in (*METHODS, "chance")}


def centers_inside(box: Box, patch_grid: tuple[int, int]) -> torch.BoolTensor:
    """Whether the center of each patch lies in a box of pixels: `(patch_rows * patch_cols,)`."""
    x0, y0, x1, y1 = box
    y, x = ((torch.arange(size) + 0.5) * IMAGE_SIZE / size for size in patch_grid)
    return ((y0 <= y) & (y < y1))[:, None].logical_and((x0 <= x) & (x < x1)).flatten()


def hit(relevance: torch.Tensor, is_inside: torch.BoolTensor) -> float:
    """Share of the most relevant patches that are inside; 0 if no patch is relevant."""
    if relevance.max() <= 0:
        return 0.0
    return is_inside[relevance == relevance.max()].float().mean().item()


def _summary(rates: list[float]) -> dict[str, float]:
    standard_error = np.std(rates, ddof=1) / len(rates) ** 0.5
    return {
        "hit_rate": round(100 * float(np.mean(rates)), 2),
        "standard_error": round(100 * float(standard_error), 2),
    }


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of the checkpoint.")],
    pooled_grid_size: Annotated[int | None, typer.Option(help="Token budget; default: the checkpoint's.")] = None,
    split: Annotated[str, typer.Option(help=f"Scans to use: {', '.join(SPLITS)}.")] = "test",
    num_pictures: Annotated[int, typer.Option(min=2, help="Number of pictures, each with one question.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Print how often the most relevant patch lies in the digit that the question is about."""
    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is not one of {', '.join(SPLITS)}", param_hint="--split")
    loaded, processor = load(model)
    result = pointing_game(loaded, processor, num_pictures, pooled_grid_size, split, seed)
    if as_json:
        report = {
            "model": model,
            "pooled_grid_size": list(parse_grid(pooled_grid_size or processor.pooled_grid_size)),
            "split": split,
            "num_pictures": num_pictures,
            "seed": seed,
            **result,
            "environment": environment(loaded.device),
        }
        typer.echo(json.dumps(report))
        return
    typer.echo(f"{'':10} hit rate  std. error")
    for name, row in result.items():
        shown = f"{row['hit_rate']:7.1f} %  {row['standard_error']:7.1f} %" if row else "  not defined"
        typer.echo(f"{name:10} {shown}")


if __name__ == "__main__":
    run("digits.pointing_game", lambda: typer.run(main))
