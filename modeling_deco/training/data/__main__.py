# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `python -m modeling_deco.training.data`."""

import logging

import typer

from ...utils.script import run
from .build import build_data


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run("data", lambda: typer.run(build_data))


if __name__ == "__main__":
    main()
