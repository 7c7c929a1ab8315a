# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pointing game: does the most relevant patch for a word of the answer lie in the thing that was asked about?

The model gets the right answer, and GAE and raw attention explain one of its words. A hit means that the center of the
most relevant patch lies in the box of the thing. If several patches share the maximum, as with raw attention in a
pooled cell, the hit counts as the share of them that lies in the box. Chance is the share of all patches whose center
lies in the box.
"""

import json
import sys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from tqdm.auto import tqdm

from ..configuration_deco import parse_grid
from ..relevance import explain
from ..relevance.explain import METHODS
from ..utils.measure import environment

ABSTRACTORS = ("c_abstractor", "d_abstractor")  # projectors without attention to patches

Result = dict[str, dict[str, float] | None]


class Target(NamedTuple):
    """A picture with a question, the right answer, the word to explain, and the box of the thing in question: left,
    top, right and bottom, 0 to 1 of the picture's width and height."""

    image: Image.Image
    question: str
    answer: str
    word: str
    box: tuple[float, float, float, float]


def play(model, processor, targets: Iterable[Target], num_pictures: int, pooled_grid_size=None) -> Result:
    """Play the pointing game.

    Args:
        pooled_grid_size: the token budget. Default: the processor's.

    Returns:
        `hit_rate` and `standard_error` (over pictures) in percent, for `"gae"`, `"attention"` and `"chance"`.
        `"attention"` is None for abstractors.
    """
    methods = [method for method in METHODS if method == "gae" or model.config.projector_type not in ABSTRACTORS]
    rates: dict[str, list] = {name: [] for name in (*methods, "chance")}
    bar = tqdm(targets, total=num_pictures, desc="pointing game", unit="picture", disable=None, file=sys.stderr)
    for target in bar:
        for method in methods:
            relevance = explain(
                model, processor, target.image, target.question, target.answer, pooled_grid_size, method
            ).average([target.word])
            is_inside = centers_inside(target.box, relevance.patch_grid)
            rates[method].append(hit(relevance.text_to_patch[0], is_inside))
        rates["chance"].append(is_inside.float().mean().item())
    return {name: _summary(rates[name]) if name in rates else None for name in (*METHODS, "chance")}


def centers_inside(box: tuple[float, float, float, float], patch_grid: tuple[int, int]) -> torch.BoolTensor:
    """Whether the center of each patch lies in a box, as in `Target`: `(patch_rows * patch_cols,)`."""
    x0, y0, x1, y1 = box
    # in float64, or a center on an edge may be on either side of it
    y, x = ((torch.arange(size, dtype=torch.float64) + 0.5) / size for size in patch_grid)
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


def show(result: Result, as_json: bool, model: str, loaded, processor, pooled_grid_size, **settings) -> None:
    """Print the result as a table, or as one JSON object with the settings and the environment."""
    if as_json:
        report = {
            "model": model,
            "pooled_grid_size": list(parse_grid(pooled_grid_size or processor.pooled_grid_size)),
            **settings,
            **result,
            "environment": environment(loaded.device),
        }
        typer.echo(json.dumps(report))
        return
    typer.echo(f"{'':10} hit rate  std. error")
    for name, row in result.items():
        shown = f"{row['hit_rate']:7.1f} %  {row['standard_error']:7.1f} %" if row else "  not defined"
        typer.echo(f"{name:10} {shown}")
