# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""JSON files that are not trusted."""

import json
from pathlib import Path

from .errors import InputError, one_line


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        InputError: the file is missing, is not JSON, is no object, or names something twice.
    """
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=without_duplicates)
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing in {path.parent}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__} where an object is expected.")
    return value


def read_settings(path: Path) -> dict:
    """The settings in a JSON file, without those that are null; empty if there is no file."""
    return {name: value for name, value in read_json(path).items() if value is not None} if path.is_file() else {}


def without_duplicates(pairs: list[tuple]) -> dict:
    """For `json.loads(object_pairs_hook=...)`, which by itself keeps the last of several."""
    names = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"duplicate key {name!r}")
        names.add(name)
    return dict(pairs)
