# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How a recipe ends: bad input is one line and exit code 2, a failure one line and exit code 1, a bug a traceback."""

import linecache
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn
from zlib import crc32

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from yaml import YAMLError

from . import program
from .errors import one_line

_PACKAGE = Path(__file__).resolve().parents[1]
_BAD_INPUT = (
    *(ValueError, ImportError, FileNotFoundError, NotADirectoryError, IsADirectoryError),
    *(TemplateError, YAMLError),
)


class _BadInput(Exception):
    """Bad input. Its message is the line that users see."""


def run(name: str, main: Callable[[], object]) -> NoReturn:
    """Run a recipe and end its process as `modeling_deco.utils.program.run` does.

    If several processes fail with the same error, one of them prints it.

    Args:
        name: beginning of the line, as in `"sft"`.
        main: the recipe, which also parses its arguments.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    program.run(name, lambda: _report_once(name, main), bad_input=(_BadInput,))


def _report_once(name: str, main: Callable[[], object]) -> None:
    try:
        main()
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        line = _line_of(error)
        if not _is_first_to_report(line):
            raise SystemExit(code) from None
        if code == 2:
            raise _BadInput(line) from None
        program.print_error(f"{name}: {line}")
        raise SystemExit(code) from None


def _exit_code(error: Exception) -> int | None:
    """Exit code of an error: 2 for bad input, 1 for a failure, None for a bug.

    Errors that the package raises by `raise` are for users. Errors of libraries are bad input before the training loop
    starts, and bugs after that.
    """
    if isinstance(error, BrokenPipeError):
        return None  # for `program.run`
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = Path(frames[-1].filename).resolve().is_relative_to(_PACKAGE)
    is_meant = type(error).__module__.startswith("modeling_deco.") or "\nValueError: Sample " in str(error)
    is_meant |= is_ours and linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip().startswith("raise ")
    # private, seen in transformers 5.19 to 5.24
    is_running = any(frame.name == "_inner_training_loop" for frame in frames)
    is_of_input = isinstance(error, _BAD_INPUT) or type(error).__module__ == "datasets.exceptions"
    if is_of_input or (isinstance(error, OSError) and error.errno is None):
        return 2 if is_meant or not (is_ours or is_running) else None
    if isinstance(error, (OSError, SafetensorError, torch.OutOfMemoryError)) or _is_failed_write(error):
        return 1
    if isinstance(error.__cause__, Exception):
        is_meant &= _exit_code(error.__cause__) is not None
    return 1 if is_meant and isinstance(error, (RuntimeError, FloatingPointError)) else None


def _is_failed_write(error: Exception) -> bool:
    """Whether torch.save or datasets failed to write, which does not raise an OSError."""
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "No space left" in str(error))


def _line_of(error: Exception) -> str:
    text = str(error)
    if "in DataLoader worker process" in text:  # followed by the worker's traceback
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return one_line(text or type(error).__name__)


def _is_first_to_report(line: str) -> bool:
    """Whether no other process of the launch has printed the same line."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        store = torch.distributed.TCPStore(  # the launcher's
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=10),
            wait_for_workers=False,
        )
        return store.add(f"reported {crc32(line.encode())}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return os.environ.get("RANK", "0") == "0"
