# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pointing game with everyday things: does the most relevant patch for a colour word lie in the thing that was
asked about?

    python -m modeling_deco.worlds.emoji.pointing_game --model DIR --pooled-grid-size 6 [--json]

Each picture has at least two things and one question about a colour, with the right answer ("The umbrella is red.").
The colour word is explained. `worlds/pointing.py` says what a hit is.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import Annotated

import numpy as np
import typer

from ...inference.loading import load
from ...utils.script import run
from ..pointing import Result, Target, play, show
from .questions import questions
from .scenes import SPLITS, render


def pointing_game(model, processor, num_pictures: int, pooled_grid_size=None, split="test", seed=0) -> Result:
    """Play the pointing game with one question about each picture.

    Args:
        pooled_grid_size: the token budget. Default: the processor's.
        split: the artists.

    Returns:
        As `worlds.pointing.play`.
    """
    targets = islice(_targets(split, seed), num_pictures)
    return play(model, processor, targets, num_pictures, pooled_grid_size)


def _targets(split: str, seed: int) -> Iterator[Target]:
    """Pictures of at least two things, of which one has a clear colour."""
    for index in count():
        scene = render(split, index, seed=seed, min_things=2)
        found = questions(scene, np.random.default_rng(index), ["colour"])
        if len(scene.things) >= 2 and found:
            (question,) = found
            (thing,) = (thing for thing in scene.things if thing.concept in question.about)
            yield Target(scene.image, question.text, question.answer, question.word, thing.box)


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of the checkpoint.")],
    pooled_grid_size: Annotated[int | None, typer.Option(help="Token budget; default: the checkpoint's.")] = None,
    split: Annotated[str, typer.Option(help=f"Artists: {', '.join(SPLITS)}.")] = "test",
    num_pictures: Annotated[int, typer.Option(min=2, help="Number of pictures, each with one question.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Print how often the most relevant patch lies in the thing that the question is about."""
    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is not one of {', '.join(SPLITS)}", param_hint="--split")
    loaded, processor = load(model)
    result = pointing_game(loaded, processor, num_pictures, pooled_grid_size, split, seed)
    settings = {"split": split, "num_pictures": num_pictures, "seed": seed}
    show(result, as_json, model, loaded, processor, pooled_grid_size, **settings)


if __name__ == "__main__":
    run("emoji.pointing_game", lambda: typer.run(main))
