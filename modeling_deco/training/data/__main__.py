# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `python -m modeling_deco.training.data`."""

import logging

import typer

from modeling_deco.training.data import build_data
from modeling_deco.utils.script import run


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run("data", lambda: typer.run(build_data))


if __name__ == "__main__":
    main()
