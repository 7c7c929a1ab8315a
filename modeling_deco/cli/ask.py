# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco ask`: one question, one answer."""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils.options import parse_grid_option
from .common import (
    MODEL_HELP,
    Device,
    DType,
    Fps,
    FramesPerTokenGrid,
    ImagePositions,
    In4Bit,
    InInt8,
    MaxFrames,
    MaxImageTokens,
    MaxNewTokens,
    PooledGridSize,
    PooledVideoGridSize,
    Revision,
    Seed,
    System,
    Temperature,
    Tiles,
    Timestamps,
    budget_options,
    check_figure,
    choose_model,
    one_line_errors,
    quiet_transformers,
    save_figure,
    write,
)


def ask(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE|VIDEO", help="Paths or URLs of images and videos; - reads one from stdin."),
    ] = None,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="Question about them.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", show_default=False, help=f"{MODEL_HELP}.")] = None,
    revision: Revision = None,
    pooled_grid_size: PooledGridSize = None,
    max_image_tokens: MaxImageTokens = None,
    tiles: Tiles = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    pooled_video_grid_size: PooledVideoGridSize = None,
    frames_per_token_grid: FramesPerTokenGrid = None,
    timestamps: Timestamps = False,
    image_positions: ImagePositions = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    seed: Seed = None,
    system: System = None,
    device: Device = None,
    dtype: DType = "auto",
    in_4bit: In4Bit = False,
    in_int8: InInt8 = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the answer and what it cost.")
    ] = False,
    relevance: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the patches that each word is based on.")
    ] = None,
    relevance_level: Annotated[
        str | None,
        typer.Option(metavar="patch|query|both", help="Draw over the patches (default), the image tokens, or both."),
    ] = None,
):
    """Answer a question about images and videos. The answer is written as it is generated.

    \b
    deco ask digits.png "What colour is the 7?"
    deco ask digits.png "Read the digits." --pooled-grid-size 3 --json
    deco ask page.png "Read the digits." --tiles 4
    deco ask https://example.org/photo.jpg "What is this?" --model DIR_OR_HUB_ID
    deco ask before.jpg after.jpg "What has changed?" --model DIR_OR_HUB_ID --4bit
    deco ask clip.mp4 "What happens first?" --model DIR_OR_HUB_ID --fps 2 --timestamps
    cat digits.png | deco ask - "Read the digits." --relevance relevance.png
    """
    with one_line_errors("ask"):
        if not images or question is None or not question.strip():
            raise ValueError('It needs an image and a question: deco ask digits.png "Read the digits."')
        if images.count("-") > 1:
            raise ValueError("stdin (-) has one image, and - is given more than once.")
        if relevance is not None:
            level = _check_relevance(relevance, relevance_level, images, system)
        elif relevance_level is not None:
            raise ValueError("--relevance-level has no effect without --relevance.")
        budget = budget_options(pooled_grid_size, max_image_tokens, tiles)
        frames: dict[str, Any] = {
            "fps": fps,
            "max_frames": max_frames,
            "pooled_video_grid_size": None
            if pooled_video_grid_size is None
            else parse_grid_option(pooled_video_grid_size),
            "frames_per_token_grid": frames_per_token_grid,
        }
        content = [_read(image) for image in images]
        videos = [part for part in content if part["type"] == "video"]
        _check_videos(bool(videos), timestamps, relevance, frames)

        from ..inference.generation import encode, with_system
        from ..inference.loading import load
        from ..inference.videos import encode_video

        quiet_transformers()
        model = choose_model("ask", model)
        loaded, processor = load(
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            in_4bit=in_4bit,
            in_int8=in_int8,
            image_positions=image_positions,
        )
        start = time.perf_counter()
        for part in videos:
            part["video"] = encode_video(loaded, processor, part["video"], **frames)
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        times = {"add_timestamps": True} if timestamps else {}
        inputs = encode(processor, with_system(processor, messages, system), **budget, **times)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        if relevance is None:
            pieces = _stream(loaded, processor, inputs, **options)
        else:
            pieces = _stream_explained(loaded, processor, content[0]["image"], question, budget, **options)
        answer, explained = write(pieces, quiet=as_json)
        if not answer:
            typer.echo("(no answer)", err=True)
        if as_json:
            report = {
                "answer": answer,
                "question": question,
                "images": images,
                "model": model,
                "pooled_grid_size": _grid(inputs, processor),
                "image_positions": loaded.config.image_positions,
                "num_image_tokens": _count(inputs, processor.image_token_id),
                **({"num_video_tokens": _count(inputs, processor.video_token_id)} if videos else {}),
                **({"num_frames": [len(part["video"].seconds) for part in videos]} if videos else {}),
                **({"pooled_video_grid_size": videos[0]["video"].size[2:]} if videos else {}),
                "num_prompt_tokens": inputs["input_ids"].shape[1],
                "seconds": time.perf_counter() - start,
            }
            typer.echo(json.dumps(report if relevance is None else report | {"relevance": str(relevance)}))
        if relevance is not None:
            from ..relevance import plot_relevance

            save_figure("--relevance", plot_relevance(explained, level), relevance)


def _grid(inputs, processor) -> list[int]:
    """The grid of the first image, or of its views."""
    from ..configuration_deco import parse_grid

    return list(
        parse_grid(
            inputs["pooled_grid_sizes"][0].tolist() if "pooled_grid_sizes" in inputs else processor.pooled_grid_size
        )
    )


def _read(source: str) -> dict:
    """An image, or where to read a video from, as a part of a message."""
    from ..inference.images import is_video, read_image

    file = sys.stdin.buffer if source == "-" else os.path.expanduser(source)
    if is_video(file):
        return {"type": "video", "video": file}
    return {"type": "image", "image": read_image(file)}


def _count(inputs, token_id: int) -> int:
    return int((inputs["input_ids"] == token_id).sum())


def _check_videos(has_videos: bool, timestamps: bool, relevance: Path | None, frames: dict) -> None:
    """Raise a ValueError if an option has no effect."""
    given = [name for name, value in frames.items() if value is not None] + ["timestamps"] * timestamps
    if given and not has_videos:
        option = "--" + given[0].replace("_", "-")
        raise ValueError(f"{option} has no effect without a video.")
    if has_videos and relevance is not None:
        raise ValueError("--relevance explains an answer about an image, not about a video.")


def _stream(model, processor, inputs, **options):
    from ..inference.generation import stream

    return stream(model, processor, inputs, **options)


def _stream_explained(model, processor, image, question: str, budget: dict, *, max_new_tokens, temperature, seed):
    """Pieces of an answer. The generator returns its relevance."""
    from ..inference.generation import sampling, stream_call
    from ..relevance import explain

    arguments = {**budget, "max_new_tokens": max_new_tokens, **sampling(temperature)}
    return stream_call(partial(explain, model, processor, image, question, **arguments), processor, seed=seed)


def _check_relevance(path: Path, level: str | None, images: list[str], system: str | None) -> str:
    """The level to draw. Raises a ValueError if relevance cannot be drawn or written."""
    levels = ("patch", "query", "both")  # relevance.LEVELS, whose import would import torch
    if len(images) > 1:
        raise ValueError(f"--relevance explains an answer about one image, got {len(images)}.")
    if system is not None:
        raise ValueError("--relevance does not support --system; leave one of them out.")
    if level not in (None, *levels):
        raise ValueError(f"--relevance-level must be one of {', '.join(levels)}, got {level!r}.")
    check_figure("--relevance", path)
    return level or levels[0]
