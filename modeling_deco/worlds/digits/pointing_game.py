# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pointing game: does the most relevant patch for a colour word lie in the digit that was asked about?

    python -m modeling_deco.worlds.digits.pointing_game --model DIR --pooled-grid-size 6 [--json]

Each picture has at least two digits and one question about a colour, with the right answer ("7 red."). The colour word
is explained. `worlds/pointing.py` says what a hit is.
"""

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import typer

from ...inference.loading import load
from ...utils.script import run
from ..pointing import Result, Target, play, show
from .questions import questions
from .scenes import IMAGE_SIZE, SPLITS, render


def pointing_game(
    model, processor, num_pictures: int, pooled_grid_size=None, split="test", seed=0, min_digits=2, max_digits=4
) -> Result:
    """Play the pointing game with one question about each picture.

    Args:
        pooled_grid_size: the token budget. Default: the processor's.
        split: the scans to use.
        min_digits, max_digits: number of digits in a picture.

    Returns:
        As `worlds.pointing.play`.
    """

    def targets() -> Iterator[Target]:
        for index in range(num_pictures):
            scene = render(split, index, seed=seed, min_digits=min_digits, max_digits=max_digits)
            (question,) = questions(scene, np.random.default_rng(index), ["colour"])
            (digit,) = (digit for digit in scene.digits if question.answer.startswith(str(digit.value)))
            x0, y0, x1, y1 = (edge / IMAGE_SIZE for edge in digit.box)
            yield Target(scene.image, question.text, question.answer, digit.colour, (x0, y0, x1, y1))

    return play(model, processor, targets(), num_pictures, pooled_grid_size)


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
    settings = {"split": split, "num_pictures": num_pictures, "seed": seed}
    show(result, as_json, model, loaded, processor, pooled_grid_size, **settings)


if __name__ == "__main__":
    run("digits.pointing_game", lambda: typer.run(main))
