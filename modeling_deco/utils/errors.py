# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors for users: one line each."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """The input of a user cannot be used. The message is one line: what is wrong, where, and what to do."""


def one_line(error: object, max_length: int = 300) -> str:
    """Text of an error in one line of at most `max_length` characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= max_length else line[: max_length - 3] + "..."


def first_names(names: Iterable[str], number: int = 3) -> str:
    """First of the sorted names, for a message: `"a, b, c and 2 more"`."""
    names = sorted(names)
    return ", ".join(names[:number]) + (f" and {len(names) - number} more" if len(names) > number else "")


@contextmanager
def as_input_errors() -> Iterator[None]:
    """Raise a ValueError of the package, whose message is one line, as an `InputError`."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


@contextmanager
def wrap_errors(what: str) -> Iterator[None]:
    """Raise the errors of libraries as an `InputError` that names `what` was read. An `InputError` passes through."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} cannot be used: {type(error).__name__}: {one_line(error)}") from error
