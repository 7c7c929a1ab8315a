# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco convert` and `deco export`: LLaVA checkpoints to DeCo checkpoints, and back."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..utils.errors import InputError, as_input_errors
from ..utils.options import parse_grid_option
from ..utils.program import print_error
from .common import Revision, quiet_transformers, report


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_error(self.format(record))


@contextmanager
def _conversion(command: str) -> Iterator[None]:
    """The log of a conversion goes to stderr. An error becomes one line there and exit code 2."""
    from .. import conversion

    quiet_transformers()
    logger, handler = logging.getLogger(conversion.__name__), _Stderr()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except (InputError, OSError) as error:
        report(command, error)
        raise typer.Exit(2) from None
    finally:
        logger.removeHandler(handler)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub id of a LLaVA checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to create.")],
    pooled_grid_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|ROWSxCOLS",
            help="Grid of image tokens, or of each view. Default: 12 (14 of 27), or that of its training.",
        ),
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="Vision tower; replaces the one that SRC names.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_ID", help="Language model of a projector or of LoRA adapters."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|float16|bfloat16", help="Type of the weights. Default: theirs."),
    ] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in DST.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the result to this repository.")
    ] = None,
    check_logits: Annotated[
        bool,
        typer.Option("--check-logits", help="Also run both models in float32 and compare logits (llava-hf)."),
    ] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="vicuna, chatml, llama3, ... or a Jinja file. Default: that of SRC."),
    ] = None,
):
    """Convert the LLaVA checkpoint SRC to the DeCo checkpoint DST. The files in SRC show its format.

    transformers' LLaVA, LLaVA-NeXT (1.6), LLaVA-NeXT-Video and LLaVA-OneVision (llava-hf):

    \b
    deco convert llava-hf/llava-1.5-7b-hf deco-7b --pooled-grid-size 12
    deco convert llava-hf/llava-v1.6-mistral-7b-hf deco-next-7b

    A whole model of the original code. Its config names the vision tower:

    \b
    deco convert liuhaotian/llava-v1.5-7b deco-7b
    deco convert llava-v1.5-7b/ deco-7b --vision-tower clip-vit-large-patch14-336/

    Its stage 1, which is a projector alone; its LoRA adapters, which are merged into the language model:

    \b
    deco convert llava-pretrain/ deco-7b --base-model lmsys/vicuna-7b-v1.5
    deco convert llava-lora/ deco-7b --base-model lmsys/vicuna-7b-v1.5

    LLaVA's code with the AvgPoolProjector of DeCo's authors, a whole model or stage 1:

    \b
    deco convert deco-finetune/ deco-7b --pooled-grid-size 12
    """
    with _conversion("convert"):
        from ..conversion import convert as run

        with as_input_errors():
            grid = None if pooled_grid_size is None else parse_grid_option(pooled_grid_size)
        options = (dtype, revision, overwrite, push_to_hub, check_logits, chat_template)
        run(source, destination, grid, vision_tower, base_model, *options)
    typer.echo(destination)


def export(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hub id of a DeCo checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to create.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in DST.")] = False,
):
    """Export the DeCo checkpoint SRC to the llava-hf checkpoint DST. LLaVA does not pool: it sees every patch.

    \b
    deco export deco-7b llava-7b
    """
    with _conversion("export"):
        from ..conversion import export as run

        run(source, destination, overwrite)
    typer.echo(destination)
