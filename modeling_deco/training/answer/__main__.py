# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `python -m modeling_deco.training.answer`."""

import logging

import typer

from ...utils.script import run
from .run import answer_data


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run("answer", lambda: typer.run(answer_data))


if __name__ == "__main__":
    main()
