# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors as users are told of them."""


def one_line(error: object) -> str:
    """An error's text in one line of at most 300 characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."
