# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco chat`: a conversation about pictures in the terminal."""

import math
import os
import shlex
import sys
from contextlib import suppress
from typing import Annotated

import typer

from .. import SHIPPED_CHECKPOINT
from ..utils.options import parse_grid_option
from .common import (
    OUT_OF_MEMORY,
    Device,
    DType,
    In4Bit,
    InInt8,
    MaxNewTokens,
    Model,
    PooledGridSize,
    Revision,
    Seed,
    System,
    Temperature,
    one_line_errors,
    quiet_transformers,
    report,
    write,
)

COMMANDS = """\
/image PATH_OR_URL               show another picture with the next question
/pooled-grid-size N|ROWSxCOLS    token budget of the pictures, from the next question on
/clear                           begin anew, without pictures
/help                            this list
/exit                            end (or Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: Model = str(SHIPPED_CHECKPOINT),
    image: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE", help="Path or URL of a picture; may be given again.")
    ] = None,
    revision: Revision = None,
    pooled_grid_size: PooledGridSize = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    seed: Seed = None,
    system: System = None,
    device: Device = None,
    dtype: DType = "auto",
    in_4bit: In4Bit = False,
    in_int8: InInt8 = False,
):
    """Talk about pictures; answers are written as they come.

    \b
    deco chat --image digits.png
    deco chat DIR_OR_HUB_ID --pooled-grid-size 8 --4bit
    printf "/image digits.png\\nRead the digits.\\n" | deco chat

    In the conversation, /image PATH shows a picture, /pooled-grid-size N changes the token budget, and /help lists
    more.
    """
    with one_line_errors("chat"):
        grid = None if pooled_grid_size is None else parse_grid_option(pooled_grid_size)

        from ..inference.images import read_image

        pictures = [read_image(os.path.expanduser(name)) for name in image or []]

        from ..inference.loading import load

        quiet_transformers()
        loaded = load(model, revision=revision, device=device, dtype=dtype, in_4bit=in_4bit, in_int8=in_int8)
        conversation = Conversation(*loaded, grid, max_new_tokens, temperature, seed, system)
        conversation.pictures += pictures
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        typer.echo(f"{model}. Ask, or /help.", err=True)
    while (line := _read_line(is_interactive)) is not None:
        if not is_interactive:  # a script wants to know of a mistake, and ends there
            with one_line_errors("chat"):
                goes_on = conversation.take(line.strip())
        else:
            goes_on = _take(conversation, line.strip())
        if not goes_on:
            break


def _take(conversation: "Conversation", line: str) -> bool:
    """On a terminal what goes wrong is said, and the conversation goes on."""
    from ..inference.errors import is_out_of_memory

    try:
        return conversation.take(line)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        report("chat", error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        report("chat", f"{OUT_OF_MEMORY} So does /clear.")
    return True


def _read_line(is_interactive: bool) -> str | None:
    """A line, or None at the end. The prompt is on stderr unless both ends are a terminal, where readline needs it."""
    on_terminal = is_interactive and sys.stdout.isatty()
    if on_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  history and editing for input()
    elif is_interactive:
        typer.echo("> ", nl=False, err=True)
    try:
        return input("> " if on_terminal else "")
    except (EOFError, KeyboardInterrupt) as end:
        if isinstance(end, KeyboardInterrupt) and not is_interactive:
            raise typer.Exit(130) from None
        typer.echo(err=True)
        return None


class Conversation:
    """Messages so far, pictures for the next question, and the token budget."""

    def __init__(
        self,
        model,
        processor,
        pooled_grid_size: list[int] | None,
        max_new_tokens: int,
        temperature: float | None = None,
        seed: int | None = None,
        system: str | None = None,
    ):
        from ..inference.generation import with_system
        from ..inference.prompt_cache import PromptCache

        self.model, self.processor = model, processor
        self.prompt_cache = PromptCache(model, math.inf)  # of one conversation: `clear` when it ends
        self.pooled_grid_size = None if pooled_grid_size is None else self._check_grid(pooled_grid_size)
        self.max_new_tokens = max_new_tokens
        self.temperature, self.seed = temperature, seed
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        with_system(processor, [question], system)  # refused before the first question
        self.system, self.messages, self.pictures = system, [], []

    def take(self, line: str) -> bool:
        """Obey a command or answer a question; whether the conversation goes on."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/image":
            from ..inference.images import read_image

            if not argument:
                raise ValueError("/image needs a path or URL: /image digits.png")
            picture = read_image(_path(argument))
            self.pictures.append(picture)
            typer.echo(f"{picture.width} x {picture.height} pixels; ask about it.", err=True)
        elif command == "/pooled-grid-size":
            self.pooled_grid_size = self._check_grid(parse_grid_option(argument))
            self.prompt_cache.clear()  # its pictures have another grid
            rows, cols = self.pooled_grid_size
            typer.echo(f"{rows} x {cols} = {rows * cols} tokens per picture.", err=True)
        elif command == "/clear":
            self.messages, self.pictures = [], []
            self.prompt_cache.clear()
        elif command == "/help":
            typer.echo(COMMANDS, err=True)
        elif command == "/exit":
            return False
        elif command.startswith("/"):
            raise ValueError(f"{command!r} is not a command; /help lists them.")
        elif line:
            self.answer(line)
        return True

    def answer(self, question: str) -> None:
        """Write the answer as it comes. A question that fails or is stopped before its answer begins is forgotten."""
        from ..inference.generation import stream, with_system

        content = [{"type": "image", "image": picture} for picture in self.pictures]
        messages = [*self.messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        pieces = stream(
            self.model,
            self.processor,
            with_system(self.processor, messages, self.system),
            pooled_grid_size=self.pooled_grid_size,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            prompt_cache=self.prompt_cache,
        )
        answer, _ = write(pieces, stoppable=sys.stdin.isatty())
        self.seed = None  # later answers draw on from that seed
        if not answer:
            typer.echo("(no answer)", err=True)
            return
        answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self.messages, self.pictures = [*messages, answered], []

    def _check_grid(self, grid: list[int]) -> list[int]:
        from ..configuration_deco import check_grid

        check_grid(grid, self.model.config.patch_grid, name="pooled-grid-size")
        return grid


def _path(argument: str) -> str:
    """A path or URL as it was typed: with `~`, in quotes, or with spaces escaped as a shell does."""
    if not os.path.exists(argument):
        with suppress(ValueError):  # more than one word, or a quote without its end
            (argument,) = shlex.split(argument)
    return os.path.expanduser(argument)
