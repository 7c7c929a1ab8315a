# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The `deco` command. Answers go to stdout, everything else to stderr.

Exit codes are 0, 1 for a failure, and 2 for bad input, which is reported in one line. The modules of all commands are
imported with the command line, so they import torch and transformers only when the command runs.
"""

from typing import Annotated

import typer

from .. import __version__
from ..utils.program import run
from . import ask, budgets, chat, convert, info, page, serve

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"modeling-deco {__version__}")
        raise typer.Exit


@app.callback()
def deco(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
):
    """DeCo vision-language models: ask questions about images at any token budget."""


app.command()(ask.ask)
app.command()(chat.chat)
app.command()(info.info)
app.command(no_args_is_help=True)(budgets.budgets)
app.command()(serve.serve)
app.command()(page.page)
app.command(no_args_is_help=True)(convert.convert)
app.command(no_args_is_help=True)(convert.export)


def main() -> None:
    """The `deco` command."""
    run("deco", lambda: app(prog_name="deco"))
