# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The `deco` command. Answers go to stdout, everything else to stderr; bad input is one line and exit code 2."""

import json
import logging
import os
import re
import sys
from contextlib import contextmanager
from importlib.util import find_spec
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


def nf4_config():
    """NF4 for bitsandbytes, or a ValueError that says what to install."""
    missing = [name for name in ("accelerate", "bitsandbytes") if find_spec(name) is None]
    if missing:
        raise ValueError(f"--4bit needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    import torch
    from transformers import BitsAndBytesConfig

    # GPUs are fastest in bfloat16, which is far finer than 4-bit weights. A CPU without bfloat16 took 2 to 5 times as
    # long in it as in float32; on those that have it, bitsandbytes uses it whatever is asked for.
    compute_dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def _check_relevance(path: Path, level: str | None) -> str:
    """The level to draw. Raises a ValueError where the picture could not be drawn, or not be written."""
    from .relevance import LEVELS

    if level not in (None, *LEVELS):
        raise ValueError(f"--relevance-level must be one of {', '.join(LEVELS)}, got {level!r}.")
    if path.suffix.lower() != ".png":
        raise ValueError(f"--relevance writes a PNG file; {str(path)!r} does not end in .png.")
    if path.is_dir():
        raise ValueError(f"--relevance: {str(path)!r} is a folder.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--relevance: there is no folder {str(path.parent)!r} that can be written to.")
    if find_spec("matplotlib") is None:
        raise ValueError("--relevance needs matplotlib: pip install matplotlib")
    return level or LEVELS[0]


def _save_figure(figure, path: Path) -> None:
    """Write beside, then rename: a file under its name is whole."""
    partial = path.with_name(f".{os.getpid()}.tmp")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    in_4bit: Annotated[
        bool,
        typer.Option("--4bit", help="Language model in 4 bits, with bitsandbytes: a quarter of 16-bit weights."),
    ] = False,
    relevance: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw what each word of the answer rests on.")
    ] = None,
    relevance_level: Annotated[
        str | None,
        typer.Option(metavar="patch|query|both", help="Over the patches (default), the image tokens, or both."),
    ] = None,
):
    """Answer QUESTION about IMAGE.

    deco ask digits.png "What colour is the 7?"

    deco ask digits.png "Read the digits." --pooled-grid-size 3 --json

    deco ask digits.png "Where is the 7?" --4bit

    deco ask digits.png "Read the digits." --relevance relevance.png
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
    from transformers.utils import logging

    from .configuration_deco import num_image_tokens

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    try:
        if relevance is not None:
            relevance_level = _check_relevance(relevance, relevance_level)
        elif relevance_level is not None:
            raise ValueError("--relevance-level has no effect without --relevance.")
        grid = None if pooled_grid_size is None else _grid(pooled_grid_size)
        # not quantization_config=None, with which an Auto class forgets that a checkpoint is quantized
        quantization = {"quantization_config": nf4_config()} if in_4bit else {}
        processor = AutoProcessor.from_pretrained(model)
        loaded = AutoModelForImageTextToText.from_pretrained(model, **quantization)
        pipe = pipeline("image-text-to-text", model=loaded, processor=processor)
        if relevance is not None:
            from .relevance import explain, plot_relevance

            explained = explain(
                pipe.model, processor, image, question, pooled_grid_size=grid, max_new_tokens=max_new_tokens
            )
            answer, figure = explained.answer, plot_relevance(explained, relevance_level)
        else:
            (output,) = pipe(
                text=[{"role": "user", "content": content}],
                processor_kwargs={"pooled_grid_size": grid},
                return_full_text=False,
                max_new_tokens=max_new_tokens,
            )
            answer = output["generated_text"].strip()
    except (ImportError, OSError, ValueError) as error:  # ImportError: a quantized checkpoint without its library
        typer.echo(f"deco ask: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        grid = grid or processor.pooled_grid_size
        report = {"answer": answer, "question": question, "image": image, "model": model}
        report |= {"pooled_grid_size": grid, "num_image_tokens": num_image_tokens(grid)}
        report |= {} if relevance is None else {"relevance": str(relevance)}
        answer = json.dumps(report)
    typer.echo(answer)
    if relevance is not None:
        try:
            _save_figure(figure, relevance)
        except OSError as error:
            typer.echo(f"deco ask: --relevance {str(relevance)!r} cannot be written: {error.strerror}.", err=True)
            raise typer.Exit(2) from None


@contextmanager
def _conversion(command: str):
    """What a conversion logs goes to stderr, and what it refuses is one line and exit code 2."""
    from transformers.utils import logging as transformers_logging

    from .conversion import ConversionError

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logger, handler = logging.getLogger(f"{__package__}.conversion"), logging.StreamHandler(sys.stderr)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except (ConversionError, OSError) as error:
        typer.echo(f"deco {command}: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    finally:
        logger.removeHandler(handler)


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub id of a LLaVA checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    pooled_grid_size: Annotated[
        str | None,
        typer.Option(metavar="N|ROWSxCOLS", help="Grid of image tokens; 12, or the one it was trained with."),
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="Vision tower, in place of the one that SRC names.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="Language model under a projector or LoRA adapters.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|float16|bfloat16", help="Cast to it; by default nothing is cast.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of SRC on the Hub.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that DST holds.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the result to this repository.")
    ] = None,
    check_logits: Annotated[
        bool, typer.Option("--check-logits", help="Also run both models, in float32, and compare (llava-hf).")
    ] = False,
):
    """Make the DeCo checkpoint DST of the LLaVA checkpoint SRC. The format is told by what SRC holds.

    transformers' LLaVA (llava-hf):

    deco convert llava-hf/llava-1.5-7b-hf deco-7b --pooled-grid-size 12

    The original code's, whole; the vision tower is the one that its config names:

    deco convert liuhaotian/llava-v1.5-7b deco-7b

    deco convert llava-v1.5-7b/ deco-7b --vision-tower clip-vit-large-patch14-336/

    Its stage 1, a projector over a language model:

    deco convert llava-pretrain/ deco-7b --base-model lmsys/vicuna-7b-v1.5

    Its LoRA adapters, merged into the language model:

    deco convert llava-lora/ deco-7b --base-model lmsys/vicuna-7b-v1.5

    LLaVA's code with the DeCo authors' AvgPoolProjector, whole or stage 1:

    deco convert deco-finetune/ deco-7b --pooled-grid-size 12
    """
    with _conversion("convert"):
        from .conversion import ConversionError
        from .conversion import convert as run

        try:
            grid = None if pooled_grid_size is None else _grid(pooled_grid_size)
        except ValueError as error:
            raise ConversionError(str(error)) from None
        run(source, destination, grid, vision_tower, base_model, dtype, revision, overwrite, push_to_hub, check_logits)
    typer.echo(destination)


@app.command(no_args_is_help=True)
def export(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub id of a DeCo checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that DST holds.")] = False,
):
    """Make the llava-hf checkpoint DST of the DeCo checkpoint SRC. LLaVA does not pool: it sees every patch.

    deco export deco-7b llava-7b
    """
    with _conversion("export"):
        from .conversion import export as run

        run(source, destination, overwrite)
    typer.echo(destination)


if __name__ == "__main__":
    app()
