# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The `deco` command. Answers go to stdout, everything else to stderr; bad input is one line and exit code 2."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="DeCo vision-language models.")

# Trained on handwritten digits (MODEL_CARD.md); what `deco ask` uses when no model is named.
SHIPPED_CHECKPOINT = Path(__file__).with_name("checkpoints") / "deco-digits"


@app.callback()
def deco():
    """DeCo vision-language models: ask questions about images at any token budget."""


def _grid(value: str) -> list[int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", value)
    if match is None:
        raise ValueError(f"--pooled-grid-size {value!r} is neither a number (8) nor ROWSxCOLS (8x12).")
    return [int(match[1]), int(match[2] or match[1])]


@app.command()
def ask(
    image: Annotated[str, typer.Argument(help="Path or URL of a picture.")],
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    model: Annotated[
        str, typer.Option(help="Folder or Hub id of a DeCo checkpoint; the shipped digits checkpoint by default.")
    ] = str(SHIPPED_CHECKPOINT),
    pooled_grid_size: Annotated[
        str | None, typer.Option(metavar="N|ROWSxCOLS", help="Token budget; the checkpoint's by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the answer and its cost.")
    ] = False,
):
    """Answer QUESTION about IMAGE.

    deco ask digits.png "What colour is the 7?"

    deco ask digits.png "Read the digits." --pooled-grid-size 3 --json
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
    from transformers.utils import logging

    from .configuration_deco import num_image_tokens

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    try:
        grid = None if pooled_grid_size is None else _grid(pooled_grid_size)
        processor = AutoProcessor.from_pretrained(model)
        pipe = pipeline(
            "image-text-to-text", model=AutoModelForImageTextToText.from_pretrained(model), processor=processor
        )
        (output,) = pipe(
            text=[{"role": "user", "content": content}],
            processor_kwargs={"pooled_grid_size": grid},
            return_full_text=False,
            max_new_tokens=max_new_tokens,
        )
    except (OSError, ValueError) as error:
        typer.echo(f"deco ask: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(2) from None
    answer = output["generated_text"].strip()
    if as_json:
        grid = grid or processor.pooled_grid_size
        report = {"answer": answer, "question": question, "image": image, "model": model}
        report |= {"pooled_grid_size": grid, "num_image_tokens": num_image_tokens(grid)}
        answer = json.dumps(report)
    typer.echo(answer)


if __name__ == "__main__":
    app()
