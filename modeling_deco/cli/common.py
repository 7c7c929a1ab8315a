# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What several commands share: options, errors in one line, and the streaming of answers."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils.errors import one_line
from ..utils.options import parse_grid_option
from ..utils.program import print_error

MODEL_HELP = (
    "Folder or Hub id of a DeCo or of a llava-hf LLaVA. Default: deco-everyday, or deco-digits where that is "
    "not available"
)
Model = Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False, help=f"{MODEL_HELP}.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.")]
PooledGridSize = Annotated[
    str | None, typer.Option(metavar="N|ROWSxCOLS", help="Token budget of each image. Default: the checkpoint's.")
]
MaxImageTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Instead of --pooled-grid-size: the largest grid with which an image has at most N tokens."
    ),
]
Tiles = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Cut each image into N tiles (4, 9, ...), in as many tokens, for a model that sees an image at once.",
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(metavar="F", help="Frames per second to read from a video. Default: the checkpoint's, often 1."),
]
MaxFrames = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="The most frames of a video; those of a longer one are spread over it."),
]
PooledVideoGridSize = Annotated[
    str | None, typer.Option(metavar="N|ROWSxCOLS", help="Token budget of each frame. Default: the checkpoint's.")
]
FramesPerTokenGrid = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Neighbouring frames of a video that are averaged.")
]
Timestamps = Annotated[
    bool, typer.Option("--timestamps", help="Write the time of each frame into the prompt, as <2.0 seconds>.")
]
ImagePositions = Annotated[
    str | None,
    typer.Option(
        metavar="patch|sequence",
        help="Whether the language model sees image tokens at the positions of their patches, or one after another. "
        "Default: the checkpoint's.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer, in tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        min=0,
        help="Sampling temperature; 0 is greedy decoding. Default: the checkpoint's.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, max=2**63 - 1, help="Seed of sampling: the same seed gives the same answer."),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message: instructions before the conversation.")
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda|cuda:N|mps", help="Device to compute on. Default: the GPUs, or the CPU if there are none."
    ),
]
DType = Annotated[
    str,
    typer.Option(metavar="auto|float32|float16|bfloat16", help="Type of the weights; auto is the checkpoint's."),
]
In4Bit = Annotated[
    bool,
    typer.Option(
        "--4bit", help="Load the language model in 4 bits with bitsandbytes: a quarter of the memory of 16 bits."
    ),
]
InInt8 = Annotated[
    bool,
    typer.Option(
        "--int8", help="Compute linear layers in 8 bits, for speed: all on a CPU, the vision tower's on CUDA."
    ),
]

OUT_OF_MEMORY = "out of memory. Choose a smaller --pooled-grid-size, or --4bit."


def choose_model(command: str, model: str | None) -> str:
    """The model that a command names, or else the default one, of which a line on stderr tells.

    Raises:
        InputError, OSError: the default model cannot be assembled in the user's cache.
    """
    if model is not None:
        return model
    from .. import SHIPPED_CHECKPOINT
    from ..inference.everyday import default_checkpoint, missing

    reason = missing()
    if reason is None:
        about = f"deco-everyday, which knows everyday things. For handwritten digits, name {SHIPPED_CHECKPOINT}"
    else:
        about = f"deco-digits, which knows only handwritten digits. deco-everyday is not available: {reason}"
    print_error(f"deco {command}: no model is named, so this is {about}")
    return str(default_checkpoint())


def budget_options(
    pooled_grid_size: str | None, max_image_tokens: int | None = None, tiles: int | None = None
) -> dict[str, Any]:
    """The token budget of images, as arguments of `inference.encode`.

    Raises:
        ValueError: the grid is malformed.
    """
    grid = None if pooled_grid_size is None else parse_grid_option(pooled_grid_size)
    options = {"pooled_grid_size": grid, "max_image_tokens": max_image_tokens, "tiles": tiles}
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def one_line_errors(command: str, out_of_memory: str = OUT_OF_MEMORY) -> Iterator[None]:
    """End the command with one line on stderr: with exit code 2 for bad input, and 1 if there is too little memory."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output has closed it; click ends silently
        raise
    except (ImportError, OSError, ValueError) as error:  # ImportError: a checkpoint or an option needs a library
        report(command, error)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        from ..inference.errors import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        report(command, out_of_memory)
        raise typer.Exit(1) from None


def report(command: str, error: object) -> None:
    """Write an error to stderr in one line. Errors of some libraries repeat megabytes of their input."""
    print_error(f"deco {command}: {one_line(error, 2000)}")


def write(pieces: Generator[str, None, Any], *, quiet: bool = False, stoppable: bool = False) -> tuple[str, Any]:
    """Write an answer to stdout as it is generated, without white space around it, and end its line.

    Args:
        pieces: pieces of its text. The generator is closed if an error occurs.
        quiet: write nothing.
        stoppable: whether Ctrl-C ends only the answer, and not the command.

    Returns:
        The answer, and what `pieces` returns.
    """
    answer, held, result = "", "", None  # white space is held until other text follows
    try:
        while True:
            text = held + next(pieces)
            written = text.rstrip() if answer else text.strip()
            held = text[len(text.rstrip()) :]
            answer += written
            if written and not quiet:
                typer.echo(written, nl=False)
    except StopIteration as end:
        result = end.value
    except KeyboardInterrupt:
        pieces.close()
        if not stoppable:
            raise typer.Exit(130) from None
    except BrokenPipeError:
        pieces.close()
        raise
    except Exception:
        if answer and not quiet:
            typer.echo()
        raise
    if answer and not quiet:
        typer.echo()
    return answer, result


def check_figure(option: str, path: Path) -> None:
    """Raise a ValueError if a figure cannot be drawn, or not be written to the path of an option."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"{option} writes a PNG file; {str(path)!r} does not end in .png.")
    if path.is_dir():
        raise ValueError(f"{option}: {str(path)!r} is a folder.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: there is no folder {str(path.parent)!r} that can be written to.")
    if find_spec("matplotlib") is None:
        raise ValueError(f"{option} needs matplotlib: pip install matplotlib")


def save_figure(option: str, figure, path: Path) -> None:
    """Write a figure of matplotlib to the path of an option: a whole PNG file, or nothing.

    Raises:
        OSError: it cannot be written.
    """
    from ..utils.staging import staged_file

    try:
        with staged_file(path) as incomplete:
            figure.savefig(incomplete, format="png")
    except OSError as error:
        raise OSError(f"{option} {str(path)!r} cannot be written: {error.strerror}.") from error


def quiet_transformers() -> None:
    """Turn off warnings and progress bars, which would mix with an answer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table. The first column is aligned on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in line).rstrip()
        for line in (enumerate(zip(row, widths, strict=True)) for row in (header, *rows))
    ]
