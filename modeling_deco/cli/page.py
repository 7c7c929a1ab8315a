# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco page`: a page for the browser."""

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from .common import (
    Device,
    DType,
    ImagePositions,
    In4Bit,
    InInt8,
    MaxNewTokens,
    Model,
    Revision,
    choose_model,
    one_line_errors,
    quiet_transformers,
)


def page(
    model: Model = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(metavar="N", help="Port; 0 for any free one. Default: the first free one from 7860 on."),
    ] = None,
    password: Annotated[
        str | None,
        typer.Option(envvar="DECO_PASSWORD", show_envvar=True, metavar="TEXT", help="Password that users must enter."),
    ] = None,
    share: Annotated[
        bool,
        typer.Option("--share", help="Also request a public address from gradio.live, which then relays all traffic."),
    ] = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    image_positions: ImagePositions = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = "auto",
    in_4bit: In4Bit = False,
    in_int8: InInt8 = False,
):
    """Serve a page to ask about images at any token budget, and to see which patches each word is based on.

    \b
    deco page --open
    deco page DIR_OR_HUB_ID --port 8080 --4bit
    DECO_PASSWORD=secret deco page DIR_OR_HUB_ID --host 0.0.0.0
    """
    with one_line_errors("page"):
        from ..page import launch

        quiet_transformers()
        with redirect_stdout(sys.stderr):  # for the page's address
            launch(
                choose_model("page", model),
                host=host,
                port=port,
                password=password,
                share=share,
                open_browser=open_browser,
                max_new_tokens=max_new_tokens,
                revision=revision,
                device=device,
                dtype=dtype,
                in_4bit=in_4bit,
                in_int8=in_int8,
                image_positions=image_positions,
            )
