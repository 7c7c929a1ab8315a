# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Options that several programs share."""

import re


def parse_grid_option(value: str) -> list[int]:
    """Parse `"8"` or `"8x12"` to `[rows, cols]`. Raise a ValueError if it is neither."""
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", value)
    if match is None:
        raise ValueError(f"The pooled grid size {value!r} is neither a number (8) nor ROWSxCOLS (8x12).")
    return [int(match[1]), int(match[2] or match[1])]
