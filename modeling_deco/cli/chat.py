# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco chat`: a conversation about images in the terminal."""

import math
import os
import shlex
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from ..utils.options import parse_grid_option
from .common import (
    OUT_OF_MEMORY,
    Device,
    DType,
    Fps,
    ImagePositions,
    In4Bit,
    InInt8,
    MaxFrames,
    MaxImageTokens,
    MaxNewTokens,
    Model,
    PooledGridSize,
    Revision,
    Seed,
    System,
    Temperature,
    Tiles,
    budget_options,
    choose_model,
    one_line_errors,
    quiet_transformers,
    report,
    write,
)

COMMANDS = """\
/image PATH_OR_URL               add an image to the next question
/video PATH_OR_URL               add a video to the next question
/pooled-grid-size N|ROWSxCOLS    set the token budget of images, from the next question on
/clear                           start a new conversation, without images
/help                            show this list
/exit                            end the conversation (or Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: Model = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE", help="Path or URL of an image; can be repeated.")
    ] = None,
    revision: Revision = None,
    pooled_grid_size: PooledGridSize = None,
    max_image_tokens: MaxImageTokens = None,
    tiles: Tiles = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    image_positions: ImagePositions = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    seed: Seed = None,
    system: System = None,
    device: Device = None,
    dtype: DType = "auto",
    in_4bit: In4Bit = False,
    in_int8: InInt8 = False,
):
    """Talk about images and videos. Answers are written as they are generated.

    \b
    deco chat --image digits.png
    deco chat DIR_OR_HUB_ID --pooled-grid-size 8 --4bit
    printf "/image digits.png\\nRead the digits.\\n" | deco chat

    In the conversation, /image PATH adds an image, /video PATH a video, /pooled-grid-size N sets the token budget, and
    /help lists all commands.
    """
    with one_line_errors("chat"):
        budget = budget_options(pooled_grid_size, max_image_tokens, tiles)

        from ..inference.images import read_image

        images = [read_image(os.path.expanduser(name)) for name in image or []]

        from ..inference.loading import load

        quiet_transformers()
        model = choose_model("chat", model)
        loaded = load(
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            in_4bit=in_4bit,
            in_int8=in_int8,
            image_positions=image_positions,
        )
        frames = {"fps": fps, "max_frames": max_frames}
        conversation = Conversation(*loaded, budget, max_new_tokens, temperature, seed, system, frames)
        conversation.parts += [{"type": "image", "image": image} for image in images]
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        typer.echo(f"{model} is loaded. Ask a question, or type /help.", err=True)
    while (line := _read_line(is_interactive)) is not None:
        if not is_interactive:  # a script ends at its first error
            with one_line_errors("chat"):
                continues = conversation.take(line.strip())
        else:
            continues = _take(conversation, line.strip())
        if not continues:
            break


def _take(conversation: "Conversation", line: str) -> bool:
    """`Conversation.take` on a terminal: an error is reported, and the conversation continues."""
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
        report("chat", f"{OUT_OF_MEMORY} /clear frees memory too.")
    return True


def _read_line(is_interactive: bool) -> str | None:
    """The next line, or None at the end of the input. The prompt goes to stderr, unless stdin and stdout are both
    terminals: then readline writes it."""
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
    """The messages so far, the images and videos of the next question, and the options of answers."""

    def __init__(
        self,
        model,
        processor,
        budget: dict[str, Any] | None,
        max_new_tokens: int,
        temperature: float | None = None,
        seed: int | None = None,
        system: str | None = None,
        frames: dict[str, Any] | None = None,
    ):
        from ..inference.generation import with_system
        from ..inference.prompt_cache import PromptCache

        self.model, self.processor = model, processor
        self.prompt_cache = PromptCache(model, math.inf)  # one conversation needs all of it
        self.budget, self.frames = budget or {}, frames or {}
        if "pooled_grid_size" in self.budget:
            self._check_grid(self.budget["pooled_grid_size"])
        self.max_new_tokens = max_new_tokens
        self.temperature, self.seed = temperature, seed
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        with_system(processor, [question], system)  # raises an error before the first question
        self.system = system
        self.messages: list[dict] = []
        self.parts: list[dict] = []

    def take(self, line: str) -> bool:
        """Run a command or answer a question. Returns whether the conversation continues."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/image":
            from ..inference.images import read_image

            if not argument:
                raise ValueError("/image needs a path or URL, as in /image digits.png")
            added = read_image(_path(argument))
            self.parts.append({"type": "image", "image": added})
            typer.echo(f"Image added: {added.width} x {added.height} pixels.", err=True)
        elif command == "/video":
            from ..inference.videos import encode_video

            if not argument:
                raise ValueError("/video needs a path or URL, as in /video clip.mp4")
            video = encode_video(self.model, self.processor, _path(argument), **self.frames)
            self.parts.append({"type": "video", "video": video})
            typer.echo(f"Video added: {len(video.seconds)} frames up to second {video.seconds[-1]:.1f}.", err=True)
        elif command == "/pooled-grid-size":
            rows, cols = grid = self._check_grid(parse_grid_option(argument))
            self.budget = {name: value for name, value in self.budget.items() if name == "tiles"}
            self.budget["pooled_grid_size"] = grid
            self.prompt_cache.clear()  # its images have another grid
            of_what = "image" if self.model.config.image_grid_pinpoints is None else "view of an image"
            typer.echo(f"{rows} x {cols} = {rows * cols} tokens per {of_what}.", err=True)
        elif command == "/clear":
            self.messages, self.parts = [], []
            self.prompt_cache.clear()
        elif command == "/help":
            typer.echo(COMMANDS, err=True)
        elif command == "/exit":
            return False
        elif command.startswith("/"):
            raise ValueError(f"{command!r} is not a command; /help lists all commands.")
        elif line:
            self.answer(line)
        return True

    def answer(self, question: str) -> None:
        """Write the answer as it is generated. A question without an answer is not kept in the conversation."""
        from ..inference.generation import stream, with_system

        messages = [*self.messages, {"role": "user", "content": [*self.parts, {"type": "text", "text": question}]}]
        pieces = stream(
            self.model,
            self.processor,
            with_system(self.processor, messages, self.system),
            **{"pooled_grid_size": None, **self.budget},
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            prompt_cache=self.prompt_cache,
        )
        answer, _ = write(pieces, stoppable=sys.stdin.isatty())
        self.seed = None  # later answers continue the random sequence
        if not answer:
            typer.echo("(no answer)", err=True)
            return
        answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self.messages, self.parts = [*messages, answered], []

    def _check_grid(self, grid: list[int]) -> list[int]:
        from ..configuration_deco import check_grid

        check_grid(grid, self.model.config.patch_grid, name="pooled-grid-size")
        return grid


def _path(argument: str) -> str:
    """The path or URL that was typed with `~`, in quotes, or with escaped spaces as in a shell."""
    if not os.path.exists(argument):
        with suppress(ValueError):  # several words, or an unclosed quote
            (argument,) = shlex.split(argument)
    return os.path.expanduser(argument)
