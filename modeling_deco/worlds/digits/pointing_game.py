"""The pointing game: does the most relevant patch for a colour word lie in the digit that was asked about?

    python -m modeling_deco.worlds.digits.pointing_game --model DIR --pooled-grid-size 6 [--json]

One colour question about each picture of held-out scans, with at least two digits. What is explained is the colour
word of the right answer, given to the model ("7 red."), by GAE and by raw attention. A hit is a most relevant patch
whose centre lies in the digit's box; where several share the maximum, as raw attention's do within a pooled cell, it
counts by their share in the box. Chance is the share of all patch centres that lie there.
"""

import json
import sys
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm.auto import tqdm

from ...configuration_deco import parse_grid
from ...inference.generation import load
from ...relevance.explain import METHODS, explain
from ...utils.measure import environment
from ...utils.script import run
from .world import IMAGE_SIZE, SPLITS, Box, questions, render

ABSTRACTORS = ("c_abstractor", "d_abstractor")  # have no attention to patches


def pointing_game(
    model, processor, num_pictures: int, pooled_grid_size=None, split="test", seed=0, min_digits=2, max_digits=4
) -> dict[str, dict[str, float] | None]:
    """For `"gae"`, `"attention"` and `"chance"`: `hit_rate` and `standard_error` in percent.

    `"attention"` is None for abstractors. The standard error is over pictures.

    Args:
        num_pictures: with one question each.
        pooled_grid_size: default: the processor's.
        split: of the scans; pictures hold `min_digits` to `max_digits` digits.
    """
    methods = [method for method in METHODS if method == "gae" or model.config.projector_type not in ABSTRACTORS]
    rates = {name: [] for name in (*methods, "chance")}
    for index in tqdm(range(num_pictures), desc="pointing game", unit="picture", disable=None, file=sys.stderr):
        scene = render(split, index, seed=seed, min_digits=min_digits, max_digits=max_digits)
        (question,) = questions(scene, np.random.default_rng(index), ["colour"])
        (digit,) = (digit for digit in scene.digits if question.answer.startswith(str(digit.value)))
        for method in methods:
            relevance = explain(
                model, processor, scene.image, question.text, question.answer, pooled_grid_size, method
            ).average([digit.colour])
            is_inside = centres_inside(digit.box, relevance.patch_grid)
            rates[method].append(hit(relevance.text_to_patch[0], is_inside))
        rates["chance"].append(is_inside.float().mean().item())
    return {name: _summary(rates[name]) if name in rates else None for name in (*METHODS, "chance")}


def centres_inside(box: Box, patch_grid: tuple[int, int]) -> torch.BoolTensor:
    """`(patch_rows * patch_cols,)`, whether the centre of each patch lies in a box of pixels."""
    x0, y0, x1, y1 = box
    y, x = ((torch.arange(size) + 0.5) * IMAGE_SIZE / size for size in patch_grid)
    return ((y0 <= y) & (y < y1))[:, None].logical_and((x0 <= x) & (x < x1)).flatten()


def hit(relevance: torch.Tensor, is_inside: torch.BoolTensor) -> float:
    """1 where the most relevant patch is inside, 0 where not or where nothing is relevant; ties count by share."""
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
    split: Annotated[str, typer.Option(help=f"Scans to draw from: {', '.join(SPLITS)}.")] = "test",
    num_pictures: Annotated[int, typer.Option(min=2, help="Pictures, each with one question.")] = 200,
    seed: Annotated[int, typer.Option(help="Another seed gives other pictures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Print how often MODEL's relevance points at the digit that was asked about."""
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
