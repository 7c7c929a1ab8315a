# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a function in a process of its own, within limits of time and memory."""

import faulthandler
import json
import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

_INTERRUPTED = 130  # exit code of a process that Ctrl-C ended


def run_within_limits(function: Callable[[], Any], what: str, seconds: float = 10, num_bytes: int = 2 << 30) -> Any:
    """Run a function in a child process. Return its result, passed as JSON, or None if it raised an error.

    Args:
        function: it reads a copy of the memory of this process, and cannot change it.
        what: subject of the error message.
        seconds: maximum time.
        num_bytes: maximum memory in addition to that of this process, on Linux.

    Raises:
        ValueError: the function takes more time or memory.
    """
    if not hasattr(os, "fork"):  # Windows
        with suppress(Exception):
            return function()
        return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking with threads is deprecated, but the child does not need them
        child = os.fork()
    if child == 0:
        _answer(function, writer, num_bytes)
    os.close(writer)
    answer, deadline = b"", time.monotonic() + seconds
    try:
        while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
            piece = os.read(reader, 1 << 16)
            if not piece:
                break
            answer += piece
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reader)
        _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == _INTERRUPTED:
        raise KeyboardInterrupt
    if not answer.endswith(b"\n"):  # incomplete: out of time or memory
        raise ValueError(f"{what} takes more than {seconds:g} seconds or {num_bytes / 2**30:g} GB.")
    return json.loads(answer)


def _answer(function: Callable[[], Any], writer: int, num_bytes: int) -> NoReturn:
    """In the child: write the result as a line of JSON, or nothing, and end."""
    code = 0
    try:
        faulthandler.disable()  # a crash prints nothing
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        with suppress(ImportError, OSError):
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + num_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            result = function()
        except Exception as error:
            if is_explosion(error):
                raise
            result = None
        with os.fdopen(writer, "wb") as file:
            file.write(json.dumps(result).encode() + b"\n")
    except KeyboardInterrupt:
        code = _INTERRUPTED
    finally:
        os._exit(code)


def is_explosion(error: Exception) -> bool:
    return isinstance(error, MemoryError | RecursionError | OverflowError) or "allocate memory" in str(error)
