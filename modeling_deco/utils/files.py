# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Read untrusted JSON files."""

import json
from pathlib import Path

from .errors import InputError, one_line


def read_json(path: Path) -> dict:
    """Read a JSON object from a file.

    Raises:
        InputError: the file is missing, is not JSON, is not an object, or has a duplicate key.
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
    """Reject duplicate keys, as `object_pairs_hook` of `json.loads`, which would keep the last one."""
    names = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"duplicate key {name!r}")
        names.add(name)
    return dict(pairs)
