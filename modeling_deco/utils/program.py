# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How a program ends: with an exit code and, after an error, one line on stderr."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from .errors import one_line


def print_error(line: str) -> None:
    """Write a line to stderr. If stderr cannot be written (full disk, closed pipe), the line is dropped."""
    # a closed file raises a ValueError; stderr is None if it was closed before Python started
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def run(name: str, main: Callable[[], object], bad_input: tuple[type[Exception], ...] = ()) -> NoReturn:
    """Run a program and end its process with exit code 0, 1 for a failure, or 2 for bad input.

    `bad_input` and OSErrors are printed as one line on stderr. Other errors keep their traceback. If the output cannot
    be written, that is an OSError too, but Python may notice it only at the end of the program.

    Args:
        name: beginning of the line, as in `"deco"`.
        main: the program. It may raise `SystemExit`, as typer does.
        bad_input: errors that mean bad input. Any other `OSError` gives exit code 1.
    """
    _open_closed_streams()
    code: str | int = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print_error(str(code))
            code = 1
    except BrokenPipeError:  # the reader has closed the output
        code = 1
    except bad_input as error:
        print_error(f"{name}: {one_line(error)}")
        code = 2
    except OSError as error:
        print_error(f"{name}: {one_line(error) if error.filename else _unwritten(error)}")
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            if stream is sys.stdout and code == 0:
                code = 1
                if not isinstance(error, BrokenPipeError):
                    print_error(f"{name}: {_unwritten(error)}")
            with suppress(OSError, ValueError):  # the rest of the buffer would fail again when Python exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _unwritten(error: Exception) -> str:
    return f"the output cannot be written: {getattr(error, 'strerror', None) or one_line(error)}"


def _open_closed_streams() -> None:
    """Open the null device in place of a closed stdin, stdout or stderr (`>&-`).

    Otherwise the next file that is opened would take the number, and libraries would print into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
