"""Ask the shipped checkpoint about handwriting that it has not seen in training.

The demo renders a picture from test scans, writes it to demo/digits.png, and asks five questions about it through
`pipeline("image-text-to-text")`, at two token budgets.
"""

import shlex
import sys
from pathlib import Path

import typer
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils import logging

from modeling_deco import SHIPPED_CHECKPOINT  # the import registers DeCo with the Auto classes
from modeling_deco.worlds.digits.scenes import render

PICTURE = Path(__file__).parents[1] / "demo" / "digits.png"
SMALLER_GRID = 3


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    scene = render("test", index=10, seed=2026, min_digits=4)
    PICTURE.parent.mkdir(exist_ok=True)
    scene.image.resize((384, 384), resample=0).save(PICTURE)
    typer.echo(f"Handwriting that the model has not seen: {PICTURE}\n")

    processor = AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED_CHECKPOINT, trust_remote_code=False)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    one, other = (digit.value for digit in scene.digits[:2])
    questions = [
        "Read the digits.",
        f"What colour is the {one}?",
        f"Is the {one} above the {other}?",
        f"Where is the {other}?",
        "How many digits are there?",
    ]
    for grid in (processor.pooled_grid_size, SMALLER_GRID):
        typer.echo(f"{grid} x {grid} = {grid * grid} tokens for the picture")
        for question in questions:
            content = [{"type": "image", "image": str(PICTURE)}, {"type": "text", "text": question}]
            output = pipe(
                text=[{"role": "user", "content": content}],
                processor_kwargs={"pooled_grid_size": grid},
                return_full_text=False,
            )
            typer.echo(f"  {question:30} {output[0]['generated_text']}")
        typer.echo()
    truth = ", ".join(f"{digit.colour} {digit.value}" for digit in scene.digits)
    typer.echo(f"In the picture, from left to right: {truth}.")
    command = [str(Path(sys.executable).with_name("deco")), "ask", str(PICTURE), "Is there a 3?"]
    typer.echo(f"Ask a question of your own:  {shlex.join(command)}")


if __name__ == "__main__":
    main()
