# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pictures that a command line names: files, URLs, folders, and the rows of data sets."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..utils.errors import one_line

Reader = Callable[[], Any]


def pictures_of(sources: list[str], split: str) -> list[tuple[str, Reader]]:
    """The name of each picture, and a function that reads it.

    Args:
        sources: paths of pictures and of folders, URLs, and data sets: what `training.answer.source` reads.
        split: of a data set. Each of its rows gives its first picture.

    Raises:
        ValueError: a folder or a data set has no pictures.
        ImportError: a data set needs a library that is not installed.
    """
    from ..inference.images import read_image
    from ..inference.pictures import find_pictures

    found: dict[str, Reader] = {}
    for source in sources:
        if _is_data(source):
            found |= _rows(source, split)
        else:
            found |= {name: partial(read_image, os.path.expanduser(name)) for name in find_pictures([source])}
    return list(found.items())


def _is_data(source: str) -> bool:
    from ..inference.pictures import PICTURE_SUFFIXES

    path = Path(source).expanduser()
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        return saved or next(path.rglob("*.parquet"), None) is not None
    suffix = path.suffix.lower()
    if path.is_file():
        return suffix in (".parquet", ".json", ".jsonl", ".txt")
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and suffix not in PICTURE_SUFFIXES


def _rows(source: str, split: str) -> dict[str, Reader]:
    try:
        from ..training.answer.source import read_source
    except ModuleNotFoundError as error:
        raise ImportError(f"The data set {source!r} needs {error.name}: pip install {error.name}") from None
    try:
        rows = read_source(source, split)
    except Exception as error:  # datasets raises errors of its own for broken files
        line = one_line(error).removeprefix("--images ")
        raise ValueError(line if source in line else f"The data set {source!r} cannot be read: {line}") from None
    return {f"{source}, row {number}": partial(_first_picture, rows, number) for number in range(len(rows))}


def _first_picture(rows, number: int):
    from ..training.data.images import images_of_columns, open_image

    images = images_of_columns(rows.row(number))
    if not images:
        raise ValueError(f"Row {number} has no picture.")
    return open_image(images[0])
