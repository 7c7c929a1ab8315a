# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tensors that are computed while they are written: merged with LoRA, extended by rows, cast.

Like `StoredTensor` they have `dtype`, `shape`, `num_bytes` and `read_bytes()`. They hold no more than a piece in
memory, and `read_bytes()` gives the same bytes each time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ..utils.errors import InputError
from .stored import StoredTensor, to_bytes

_PIECE_BYTES = 16 << 20  # computed at once, in float32


class _Computed:
    """A tensor that is computed from `tensor`, with its key, file and shape."""

    tensor: "OutputTensor"
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return self.tensor.key

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def offset(self) -> int | None:
        return self.tensor.offset

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MergedLora(_Computed):
    """`W + B A * scale` (arXiv 2106.09685), summed in float32."""

    tensor: "SourceTensor"  # (out_features, in_features)
    lora_a: StoredTensor  # (rank, in_features)
    lora_b: StoredTensor  # (out_features, rank)
    scale: float
    dtype: torch.dtype
    how = "merged with LoRA"

    def read_bytes(self) -> Iterator[memoryview]:
        rows_per_piece = max(1, _PIECE_BYTES // (4 * self.shape[1]))
        for first in range(0, self.shape[0], rows_per_piece):
            yield to_bytes(self.read(first, first + rows_per_piece))

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The tensor, or its rows `first` to `last`."""
        lora_a, lora_b = self.lora_a.read().float(), self.lora_b.read(first, last).float()
        weight = self.tensor.read(first, last).float()
        return _cast(weight + (lora_b @ lora_a) * self.scale, self.dtype, self.key)


@dataclass(frozen=True)
class Extended(_Computed):
    """Embeddings with rows for new tokens.

    A new row is the mean of the old rows plus a little noise, as in transformers' convert_llava_weights_to_hf.py
    (covariance times 1e-5), but with a fixed seed and the diagonal of the covariance only.
    """

    tensor: "SourceTensor"
    num_rows: int

    @property
    def how(self) -> str:
        return f"{self.tensor.how}, and {self.num_rows - self.tensor.shape[0]} rows added"

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, *self.tensor.shape[1:])

    def read_bytes(self) -> Iterator[memoryview]:
        old_rows, width = self.tensor.shape
        sums, squares = torch.zeros(2, width, dtype=torch.float64)
        rows_per_piece = max(1, _PIECE_BYTES // (4 * width))
        for first in range(0, old_rows, rows_per_piece):
            rows = self.tensor.read(first, first + rows_per_piece)
            yield to_bytes(rows)
            rows = rows.float()
            sums += rows.sum(0)
            squares += rows.square_().sum(0)
        mean = sums / old_rows
        variance = (squares / old_rows - mean.square()).clamp(min=0)
        noise = torch.randn(self.num_rows - old_rows, width, generator=torch.Generator().manual_seed(0))
        yield to_bytes((mean + noise * (1e-5 * variance).sqrt()).to(self.dtype))


@dataclass(frozen=True)
class Cast(_Computed):
    """A tensor in another float type."""

    tensor: "OutputTensor"
    dtype: torch.dtype

    @property
    def how(self) -> str:
        return f"{self.tensor.how}, cast from {str(self.tensor.dtype).removeprefix('torch.')}"

    def read_bytes(self) -> Iterator[memoryview]:
        for piece in self.tensor.read_bytes():
            values = torch.frombuffer(piece, dtype=self.tensor.dtype)
            yield to_bytes(_cast(values, self.dtype, self.key))


SourceTensor = StoredTensor | MergedLora  # a tensor of the model that is converted
OutputTensor = SourceTensor | Extended | Cast  # a tensor of the model that is written


def _cast(values: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    cast = values.to(dtype)
    if cast.isinf().sum() > values.isinf().sum():
        raise InputError(f"A value of {key!r} does not fit {dtype}; choose --dtype bfloat16 or float32.")
    return cast
