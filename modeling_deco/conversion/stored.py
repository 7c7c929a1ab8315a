# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tensors in weight files. Their values are read in pieces, when they are needed.

What this pays: a conversion of 1.6 GB takes 79 MB of memory (158 MB from `.bin` files). Reading by `safe_open` or
`torch.load`, which map the whole file, takes 1,631 MB (1,297 MB) and 1.27 (0.92) times as long:
`benchmarks/conversion.py --num-layers 1`, results in `benchmarks/results/conversion_variants.json`.
"""

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import torch

from ..utils.errors import InputError, one_line

MAX_HEADER_BYTES = 16 << 20  # of a header or a pickle; that of a model of 13 billion parameters has 0.1 MB
CHUNK_BYTES = 256 << 10  # a piece stays in the processor's cache while it is read, hashed and written


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    `offset` is the position of its first byte. It is None if the bytes are not in one piece (a transposed view) or if
    their position is unknown; then torch loads the tensor.
    """

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None
    how = "copied"

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read_bytes(self) -> Iterator[memoryview]:
        """The bytes of the tensor in pieces. Use a piece before you ask for the next, which overwrites it."""
        if self.offset is None:
            yield to_bytes(load_tensor(self.path, self.key))
            return
        yield from read_range(self.path, self.offset, self.num_bytes)

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The tensor, or its rows `first` to `last`."""
        if self.offset is None:
            return load_tensor(self.path, self.key)[first:last].clone()
        rows = self.shape[0] if last is None else min(last, self.shape[0])
        row_bytes = self.num_bytes // self.shape[0]
        data = bytearray((rows - first) * row_bytes)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + first * row_bytes)
            _read_into(file, memoryview(data))
        return torch.frombuffer(data, dtype=self.dtype).view(rows - first, *self.shape[1:])


def read_range(path: Path, offset: int, num_bytes: int) -> Iterator[memoryview]:
    """The bytes of a range of a file in pieces. Use a piece before you ask for the next, which overwrites it."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, num_bytes)))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        for start in range(0, num_bytes, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, num_bytes - start)]
            _read_into(file, piece)
            yield piece


def _read_into(file, piece: memoryview) -> None:
    filled = 0
    while filled < len(piece):
        num_read = file.readinto(piece[filled:])
        if not num_read:
            raise InputError(
                f"{Path(file.name).name} became shorter while it was read; does another program write it?"
            )
        filled += num_read


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def load_tensor(path: Path, key: str) -> torch.Tensor:
    return load_pickle(path, mmap=is_zip(path))[key].resolve_neg()


@lru_cache(maxsize=1)  # a legacy file is loaded whole, and then its tensors are read one after the other
def load_pickle(path: Path, **kwargs):
    try:
        return torch.load(path, weights_only=True, **{"map_location": "cpu", **kwargs})
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"would run code when it is unpickled ({match[1]})" if match else f"is refused: {one_line(error)}"
        raise InputError(f"{path} {what}; it was not loaded.") from None
    except Exception as error:  # its type depends on what is broken in the file
        raise InputError(f"{path} cannot be read: it is truncated or no PyTorch file: {one_line(error)}") from None


def release_files() -> None:
    """Close the file that was loaded last."""
    load_pickle.cache_clear()


def is_zip(path: Path) -> bool:
    """Whether a file has the zip format of torch.save since 1.6. The test is that of torch.load."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
