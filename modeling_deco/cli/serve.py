# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco serve`: an OpenAI-compatible server of one model."""

from typing import Annotated

import typer

from .common import (
    Device,
    DType,
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
)


def serve(
    model: Model = None,
    revision: Revision = None,
    pooled_grid_size: PooledGridSize = None,
    max_image_tokens: MaxImageTokens = None,
    tiles: Tiles = None,
    image_positions: ImagePositions = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = None,
    seed: Seed = None,
    system: System = None,
    device: Device = None,
    dtype: DType = "auto",
    in_4bit: In4Bit = False,
    in_int8: InInt8 = False,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port; 0 for any free one.")] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name for clients. Default: the folder's name or the Hub id."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="DECO_API_KEY", show_envvar=True, metavar="KEY", help="API key that clients must send."),
    ] = None,
    allow_files: Annotated[
        bool, typer.Option("--allow-files", help="Allow image URLs that name files of this machine.")
    ] = False,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Allow image URLs that lead to addresses that are not public.")
    ] = False,
    max_images: Annotated[int, typer.Option(metavar="N", min=0, help="Maximum number of images in a request.")] = 8,
    max_image_pixels: Annotated[
        int, typer.Option(metavar="N", min=1, help="Maximum number of pixels of all images in a request.")
    ] = 50_000_000,
    max_videos: Annotated[int, typer.Option(metavar="N", min=0, help="Maximum number of videos in a request.")] = 2,
    max_frames: MaxFrames = None,
    max_queue: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Maximum number of requests that wait, and of requests whose images are read. Others get status 429.",
        ),
    ] = 32,
    max_body_mib: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum size of a request.")] = 32,
    max_connections: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Maximum number of open connections. Default: half of the open files allowed, at most 1000.",
        ),
    ] = None,
    prompt_cache_mib: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Size of the cache of earlier turns; for a 7B model, 1024 MiB hold 2000 tokens."
        ),
    ] = 1024,
):
    """Serve a model to OpenAI clients, at http://127.0.0.1:8000/v1.

    \b
    deco serve DIR_OR_HUB_ID
    deco serve DIR_OR_HUB_ID --4bit --port 9000 --pooled-grid-size 8
    DECO_API_KEY=secret deco serve DIR_OR_HUB_ID --host 0.0.0.0

    Requests send images and videos as data URLs or public addresses. The server answers one request at a time; the
    others wait. The options --pooled-grid-size, --temperature, --seed and --system are defaults: a request can set its
    own. --max-new-tokens is the default and the maximum. Ctrl-C stops the server.
    """
    with one_line_errors("serve"):
        from ..inference.limits import ImageLimits
        from ..serving import ServerOptions
        from ..serving import serve as run

        quiet_transformers()
        options = ServerOptions(
            api_key=api_key,
            allow_files=allow_files,
            allow_private=allow_private,
            **budget_options(pooled_grid_size, max_image_tokens, tiles),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            system=system,
            max_queue=max_queue,
            max_images=max_images,
            max_videos=max_videos,
            max_frames=max_frames,
            image_limits=ImageLimits(max_pixels=max_image_pixels),
            max_body_bytes=max_body_mib * 2**20,
            max_connections=max_connections,
            prompt_cache_bytes=prompt_cache_mib * 2**20,
        )
        run(
            choose_model("serve", model),
            host=host,
            port=port,
            served_model_name=served_model_name,
            options=options,
            revision=revision,
            device=device,
            dtype=dtype,
            in_4bit=in_4bit,
            in_int8=in_int8,
            image_positions=image_positions,
        )
