# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco page`: a page in the browser."""

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from .. import SHIPPED_CHECKPOINT
from .common import In4Bit, MaxNewTokens, Model, Revision, one_line_errors, quiet_transformers


def page(
    model: Model = str(SHIPPED_CHECKPOINT),
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port to listen on; by default the first free one from 7860 on.")
    ] = None,
    revision: Revision = None,
    max_new_tokens: MaxNewTokens = 128,
    in_4bit: In4Bit = False,
    share: Annotated[
        bool, typer.Option("--share", help="Also ask gradio.live for a public address, through which all goes.")
    ] = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Show the page in this machine's browser.")] = False,
):
    """A page in the browser: a picture, a question, a token budget, and what each word of the answer rests on.

    \b
    deco page --open
    deco page DIR_OR_HUB_ID --host 0.0.0.0 --port 8080 --4bit
    """
    with one_line_errors("page"):
        from ..page import launch

        quiet_transformers()
        with redirect_stdout(sys.stderr):  # gradio prints its address
            launch(
                model,
                host=host,
                port=port,
                share=share,
                open_browser=open_browser,
                max_new_tokens=max_new_tokens,
                revision=revision,
                in_4bit=in_4bit,
            )
