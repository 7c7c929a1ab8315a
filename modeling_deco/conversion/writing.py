# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Writing weights: safetensors files piece by piece, each tensor read back and compared with its source."""

import json
import os
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from safetensors import safe_open
from xxhash import xxh3_128

from ..utils.errors import ConversionError
from .weights import CHUNK_BYTES, SAFETENSORS_DTYPES, StoredTensor, read_range, release_files

MAX_SHARD_BYTES = 5 * 10**9
FLUSH_BYTES = 64 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Digests:
    """XXH3 (128 bits) of the tensors by name, of the files that were written by name, and of the source's by path; and
    how many values of tensors are NaN or infinite, by name, of those that have such."""

    tensors: dict[str, str]
    files: dict[str, str]
    source_files: dict[Path, str]
    nonfinite: dict[str, int]


def digest_of(tensor) -> str:
    """XXH3 (128 bits) of a tensor's bytes."""
    return _digest(tensor.read_bytes())


def _digest(pieces: Iterable, stop: Event | None = None) -> str:
    hasher = xxh3_128()
    for piece in pieces:
        if stop is not None and stop.is_set():
            break
        hasher.update(piece)
    return hasher.hexdigest()


def _digest_written(pieces: Iterable, dtype: torch.dtype, stop: Event) -> tuple[str, int]:
    """The digest of a tensor's bytes, and the number of its values that are NaN or infinite."""
    hasher, num_nonfinite = xxh3_128(), 0
    for piece in pieces:
        if stop.is_set():
            break
        hasher.update(piece)
        num_nonfinite += piece.nbytes // dtype.itemsize - int(torch.frombuffer(piece, dtype=dtype).isfinite().sum())
    return hasher.hexdigest(), num_nonfinite


def write_weights(tensors: dict, folder: Path, source_files: list[Path], progress: Callable[[int], None]) -> Digests:
    """Write tensors to safetensors files of at most 5 GB, with an index where there are several.

    Args:
        tensors: of `StoredTensor`, `MergedLora`, `Extended` and `Cast`, by name.
        folder: where to.
        source_files: files whose digests are wanted; they are read meanwhile.
        progress: called with numbers of bytes as they are written.

    Raises:
        ConversionError: what is read back is not what was written, or a value is not the same when computed again.
    """
    shards = _shards(tensors)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    written, files, read_back, recomputed = {}, {}, {}, {}
    reader, flusher, stop = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1), Event()
    try:
        sources = {
            path: reader.submit(_digest, read_range(path, 0, path.stat().st_size), stop) for path in source_files
        }
        for name, shard in zip(names, shards, strict=True):
            header, offsets = _header(shard)
            with _HashedFile(folder / name, flusher) as file:
                file.write(header)
                for key, tensor in shard.items():
                    written[key] = _write_tensor(file, tensor, progress)
                    written_bytes = read_range(folder / name, offsets[key], tensor.num_bytes)
                    read_back[key] = reader.submit(_digest_written, written_bytes, tensor.dtype, stop)
                    if not isinstance(tensor, StoredTensor):
                        recomputed[key] = reader.submit(_digest, tensor.read_bytes(), stop)
            files[name] = file.hasher.hexdigest()
        nonfinite = {}
        for key, result in read_back.items():
            digest, num_nonfinite = result.result()
            if num_nonfinite:
                nonfinite[key] = num_nonfinite
            if digest != written[key]:
                raise ConversionError(f"{key!r} was read back with other bytes than were written; try again.")
        for key, result in recomputed.items():
            if result.result() != written[key]:
                raise ConversionError(f"{key!r} was computed twice with different results; try again.")
        digests = Digests(written, files, {path: result.result() for path, result in sources.items()}, nonfinite)
    finally:
        stop.set()
        for executor in (reader, flusher):
            executor.shutdown(cancel_futures=True)
        release_files()
    for name, shard in zip(names, shards, strict=True):
        with safe_open(folder / name, framework="pt") as file:
            if set(file.keys()) != set(shard):
                raise ConversionError(f"{name} was read back with other keys than were written; try again.")
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total_size = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return digests


class _HashedFile:
    """A new file that is hashed as it is written, and is on the disk when it is closed.

    Another thread flushes it all the while: the disk works beside the copying, and the kernel never stops the writer
    for having too much to write later.
    """

    def __init__(self, path: Path, flusher: Executor):
        self.file = open(path, "wb", buffering=0)
        self.hasher = xxh3_128()
        self.flusher, self.flushes, self.num_unflushed = flusher, [], 0

    def __enter__(self):
        return self

    def write(self, data) -> None:
        self.hasher.update(data)
        self.num_unflushed += len(data)
        while data:
            data = data[self.file.write(data) :]
        if self.num_unflushed >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        self.flushes.append(self.flusher.submit(os.fsync, self.file.fileno()))
        self.num_unflushed = 0

    def __exit__(self, *exception) -> None:
        self.flush()
        errors = [flush.exception() for flush in self.flushes]  # an error is reported to one of them only
        self.file.close()
        if exception[0] is None and any(errors):
            raise next(filter(None, errors))


def _write_tensor(file: _HashedFile, tensor, progress: Callable[[int], None]) -> str:
    """Write a tensor; its digest is of the bytes as they came from the source."""
    hasher = xxh3_128()
    for piece in tensor.read_bytes():
        for start in range(0, len(piece), CHUNK_BYTES):
            chunk = piece[start : start + CHUNK_BYTES]
            hasher.update(chunk)
            file.write(chunk)
        progress(len(piece))
    return hasher.hexdigest()


def _shards(tensors: dict) -> list[dict]:
    shards, size = [{}], 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.num_bytes
    # wider types first, so that each tensor is aligned to its type
    return [dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)) for shard in shards]


def _header(shard: dict) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and where in the file each tensor begins."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in shard.items():
        begin, end = end, end + tensor.num_bytes
        entries[key] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = struct.pack("<Q", len(header)) + header
    return header, {key: len(header) + entries[key]["data_offsets"][0] for key in shard}
