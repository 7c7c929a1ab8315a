# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors of other libraries, in one line that names the checkpoint."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..utils.errors import one_line


@contextmanager
def named_errors(name: str | os.PathLike) -> Iterator[None]:
    """Turn the errors of libraries into a ValueError of one line that names the checkpoint.

    `ImportError` and a lack of memory pass through.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(f"{name} needs code that comes with it, which is not run.") from error
        raise ValueError(f"{name} cannot be loaded: {one_line(error)}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is a lack of memory, of a GPU or of the machine."""
    is_named_so = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_named_so or "can't allocate memory" in str(error)  # a RuntimeError on CPUs
