# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What several commands need: their shared options, and errors in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

MODEL_HELP = "Folder or Hub id of a DeCo checkpoint; by default the shipped one, which knows digits"
Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=f"{MODEL_HELP}.")]
PooledGridSize = Annotated[
    str | None, typer.Option(metavar="N|ROWSxCOLS", help="Token budget of an image; the checkpoint's by default.")
]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")]
In4Bit = Annotated[
    bool, typer.Option("--4bit", help="Language model in 4 bits, with bitsandbytes: a quarter of 16-bit weights.")
]


def parse_grid_option(value: str) -> list[int]:
    """`[rows, cols]` of `"8"` or `"8x12"`. Raises a ValueError where it is neither."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", value)
    if match is None:
        raise ValueError(f"--pooled-grid-size {value!r} is neither a number (8) nor ROWSxCOLS (8x12).")
    return [int(match[1]), int(match[2] or match[1])]


@contextmanager
def one_line_errors(command: str, model: str | None = None) -> Iterator[None]:
    """Bad input ends the command with one line on stderr and exit code 2, a lack of memory with exit code 1.

    What transformers and huggingface_hub say of files that are not there does not always name the model.
    """
    try:
        yield
    except (ImportError, OSError, ValueError) as error:  # ImportError: a library that a checkpoint or option needs
        is_unnamed = isinstance(error, OSError) and model is not None and model not in str(error)
        report(command, f"{model}: {error}" if is_unnamed else error)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        report(command, "out of memory; a smaller --pooled-grid-size or --4bit needs less.")
        raise typer.Exit(1) from None


def report(command: str, error: object) -> None:
    """One line on stderr."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    typer.echo(f"deco {command}: {lines[0]}", err=True)


def is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError by its name, since torch is not imported here; on CPUs it is a plain RuntimeError
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def quiet_transformers() -> None:
    """Neither warnings nor progress bars beside an answer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
