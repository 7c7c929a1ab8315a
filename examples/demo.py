"""Ask the shipped checkpoint in English about a picture by an artist whose drawings it has not seen in training.

The demo writes the picture to demo/everyday.png, asks about it through `pipeline("image-text-to-text")` at two token
budgets, and draws what a word of an answer rests on to demo/relevance.png. With `--digits`, or where the language
model is not installed, it asks the checkpoint of the digits about handwriting that it has not seen.
"""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils import logging

# the import registers DeCo with the Auto classes
from modeling_deco import SHIPPED_CHECKPOINT, everyday_checkpoint, explain, plot_relevance

FOLDER = Path(__file__).parents[1] / "demo"
QUESTIONS = ["What do you see?", "How many things are there?", "Name the animals.", "Describe the picture."]


def main(digits: Annotated[bool, typer.Option("--digits", help="Ask about handwritten digits.")] = False) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    FOLDER.mkdir(exist_ok=True)
    try:
        checkpoint = None if digits else everyday_checkpoint()
    except ValueError as error:
        typer.echo(f"{error}\nSo this is the checkpoint of the digits.\n")
        checkpoint = None
    picture, questions, truth = draw_digits()  # for the examples in the documents, too
    if checkpoint is None:
        checkpoint = SHIPPED_CHECKPOINT
        typer.echo(f"Handwriting that the model has not seen: {picture}\n")
    else:
        picture, questions, truth = FOLDER / "everyday.png", QUESTIONS, None
        shutil.copyfile(checkpoint / "everyday.png", picture)
        typer.echo(f"Drawings of an artist that the model has not seen: {picture}\n")
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=False)
    ask(model, processor, picture, questions)
    if truth is not None:
        typer.echo(f"In the picture, from left to right: {truth}.")
    explained = explain(model, processor, picture, questions[0])
    plot_relevance(explained).savefig(FOLDER / "relevance.png")
    typer.echo(f"What each word of {explained.answer!r} rests on: {FOLDER / 'relevance.png'}")
    command = [str(Path(sys.executable).with_name("deco")), "ask", str(picture), questions[-1]]
    typer.echo(f"Ask a question of your own:  {shlex.join([*command, '--model', str(checkpoint)])}")


def ask(model, processor, picture: Path, questions: list[str]) -> None:
    """Print the answers at the checkpoint's grid, and at a quarter of its tokens."""
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    for grid in (processor.pooled_grid_size, processor.pooled_grid_size // 2):
        typer.echo(f"{grid} x {grid} = {grid * grid} tokens for the picture")
        for question in questions:
            content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": question}]
            output = pipe(
                text=[{"role": "user", "content": content}],
                processor_kwargs={"pooled_grid_size": grid},
                return_full_text=False,
            )
            typer.echo(f"  {question:30} {output[0]['generated_text'].strip()}")
        typer.echo()


def draw_digits() -> tuple[Path, list[str], str]:
    """A picture of test scans, questions about it, and what it shows."""
    from modeling_deco.worlds.digits.scenes import render

    scene = render("test", index=10, seed=2026, min_digits=4)
    scene.image.resize((384, 384), resample=0).save(FOLDER / "digits.png")
    one, other = (digit.value for digit in scene.digits[:2])
    questions = [
        "Read the digits.",
        f"What colour is the {one}?",
        f"Is the {one} above the {other}?",
        f"Where is the {other}?",
        "How many digits are there?",
    ]
    truth = ", ".join(f"{digit.colour} {digit.value}" for digit in scene.digits)
    return FOLDER / "digits.png", questions, truth


if __name__ == "__main__":
    typer.run(main)
