# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What several commands need: their shared options, and errors in one line."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..utils.errors import one_line
from ..utils.program import print_error

MODEL_HELP = "Folder or Hub id of a DeCo checkpoint; by default the shipped one, which knows digits"
Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=f"{MODEL_HELP}.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.")]
PooledGridSize = Annotated[
    str | None, typer.Option(metavar="N|ROWSxCOLS", help="Token budget of an image; the checkpoint's by default.")
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        min=0,
        help="0 takes the likeliest token each time; the higher, the freer the choice. The checkpoint's by default.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", min=0, max=2**63 - 1, help="The same seed draws the same answer.")
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Instructions before the conversation (system message).")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda|cuda:N|mps", help="Where to compute; the GPUs by default, else the CPU."),
]
DType = Annotated[
    str,
    typer.Option(metavar="auto|float32|float16|bfloat16", help="Type of weights; auto is the checkpoint's."),
]
In4Bit = Annotated[
    bool, typer.Option("--4bit", help="Language model in 4 bits, with bitsandbytes: a quarter of 16-bit weights.")
]
InInt8 = Annotated[
    bool, typer.Option("--int8", help="Linear layers in 8 bits, for speed: on a CPU all, on CUDA the vision tower's.")
]

OUT_OF_MEMORY = "out of memory; a smaller --pooled-grid-size or --4bit needs less."


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Bad input ends the command with one line on stderr and exit code 2, a lack of memory with exit code 1."""
    try:
        yield
    except BrokenPipeError:  # whoever read the answers has left; click ends silently
        raise
    except (ImportError, OSError, ValueError) as error:  # ImportError: a library that a checkpoint or option needs
        report(command, error)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        from ..inference.errors import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        report(command, OUT_OF_MEMORY)
        raise typer.Exit(1) from None


def report(command: str, error: object) -> None:
    """One line on stderr. Some libraries' errors repeat megabytes of what they were given."""
    print_error(f"deco {command}: {one_line(error, 2000)}")


def write(pieces: Generator[str, None, Any], *, quiet: bool = False, stoppable: bool = False) -> tuple[str, Any]:
    """Write an answer to stdout as it comes, without white space around it, and end its line.

    Args:
        pieces: of its text; closed where something goes wrong.
        quiet: write nothing.
        stoppable: whether Ctrl-C ends the answer alone, and not the command.

    Returns:
        The answer, and what `pieces` returns.
    """
    answer, held, result = "", "", None  # white space is held back until something follows it
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


def quiet_transformers() -> None:
    """Neither warnings nor progress bars beside an answer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
