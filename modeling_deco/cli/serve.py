# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco serve`: an OpenAI-compatible server of one model."""

from typing import Annotated

import typer

from .. import SHIPPED_CHECKPOINT
from ..utils.options import parse_grid_option
from .common import (
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
)


def serve(
    model: Model = str(SHIPPED_CHECKPOINT),
    revision: Revision = None,
    pooled_grid_size: PooledGridSize = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = None,
    seed: Seed = None,
    system: System = None,
    device: Device = None,
    dtype: DType = "auto",
    in_4bit: In4Bit = False,
    in_int8: InInt8 = False,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 is a free one.")] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name for clients; by default the folder's or the Hub id."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="DECO_API_KEY", show_envvar=True, metavar="KEY", help="What clients must send."),
    ] = None,
    allow_files: Annotated[
        bool, typer.Option("--allow-files", help="Image URLs may name files of this machine.")
    ] = False,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Image URLs may lead to addresses that are not public.")
    ] = False,
    max_images: Annotated[int, typer.Option(metavar="N", min=0, help="Images in a request.")] = 8,
    max_image_pixels: Annotated[
        int, typer.Option(metavar="N", min=1, help="Pixels of all images of a request together.")
    ] = 50_000_000,
    max_queue: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Requests that wait while one is answered, and whose pictures are being read; more get status 429.",
        ),
    ] = 32,
    max_body_mib: Annotated[int, typer.Option(metavar="N", min=1, help="Size of a request.")] = 32,
    max_connections: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Open at once; by default half of the files that the process may open, at most 1000.",
        ),
    ] = None,
    prompt_cache_mib: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Keys and values kept for the next turns; of a 7B model 1024 are 2000 tokens."
        ),
    ] = 1024,
):
    """Serve a model to OpenAI clients, at http://127.0.0.1:8000/v1.

    \b
    deco serve DIR_OR_HUB_ID
    deco serve DIR_OR_HUB_ID --4bit --port 9000 --pooled-grid-size 8
    DECO_API_KEY=secret deco serve DIR_OR_HUB_ID --host 0.0.0.0

    Images come as data URLs or from public addresses. One request is answered at a time, the others wait. A request
    may say itself what --pooled-grid-size, --max-new-tokens (up to it), --temperature, --seed and --system say here.
    Ctrl-C ends it.
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
            pooled_grid_size=None if pooled_grid_size is None else parse_grid_option(pooled_grid_size),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            system=system,
            max_queue=max_queue,
            max_images=max_images,
            image_limits=ImageLimits(max_pixels=max_image_pixels),
            max_body_bytes=max_body_mib * 2**20,
            max_connections=max_connections,
            prompt_cache_bytes=prompt_cache_mib * 2**20,
        )
        run(
            model,
            host=host,
            port=port,
            served_model_name=served_model_name,
            options=options,
            revision=revision,
            device=device,
            dtype=dtype,
            in_4bit=in_4bit,
            in_int8=in_int8,
        )
