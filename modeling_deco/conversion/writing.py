# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Write safetensors files in pieces. Each tensor is read back and compared with its source.

What this pays: a conversion of 1.6 GB takes 79 MB of memory (158 MB from `.bin` files). Reading by `safe_open` or
`torch.load` and writing by `save_file`, 1 GB at a time, takes 1,628 MB (1,936 MB) and 1.39 (1.05) times as long:
`benchmarks/conversion.py --num-layers 1`, results in `benchmarks/results/conversion_variants.json`.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import BinaryIO

import torch
from safetensors import safe_open
from xxhash import xxh3_128

from ..utils.errors import InputError
from .stored import CHUNK_BYTES, StoredTensor, read_range, release_files
from .tensors import OutputTensor
from .weights import SAFETENSORS_DTYPES

MAX_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Digests:
    """XXH3 digests (128 bits) of what was written and read.

    Attributes:
        tensors: of the written tensors, by name.
        files: of the written files, by name.
        source_files: of the files of the source, by path.
        nonfinite: the number of NaN and infinite values, by name of the tensors that have such.
    """

    tensors: dict[str, str]
    files: dict[str, str]
    source_files: dict[Path, str]
    nonfinite: dict[str, int]


def write_weights(
    tensors: Mapping[str, OutputTensor], folder: Path, source_files: list[Path], progress: Callable[[int], None]
) -> Digests:
    """Write tensors to safetensors files of at most 5 GB, and an index if there are several files.

    A second thread reads everything back while the first one writes.

    Args:
        tensors: the tensors to write, by name.
        folder: an existing folder.
        source_files: files whose digests are wanted.
        progress: called with the number of bytes after each piece.

    Raises:
        InputError: a tensor was read back with other bytes, or was computed again with another result.
    """
    shards = _shards(tensors)
    written, files, read_back, recomputed = {}, {}, {}, {}
    reader, stop = ThreadPoolExecutor(max_workers=1), Event()
    try:
        sources = {
            path: reader.submit(_digest, read_range(path, 0, path.stat().st_size), stop) for path in source_files
        }
        for name, shard in shards.items():
            header, offsets = _header(shard)
            hasher = xxh3_128(header)
            with open(folder / name, "wb", buffering=0) as file:
                _write(file, header)
                for key, tensor in shard.items():
                    written[key] = _write_tensor(file, hasher, tensor, progress)
                    written_bytes = read_range(folder / name, offsets[key], tensor.num_bytes)
                    read_back[key] = reader.submit(_digest_and_nonfinite, written_bytes, tensor.dtype, stop)
                    if not isinstance(tensor, StoredTensor):
                        recomputed[key] = reader.submit(_digest, tensor.read_bytes(), stop)
            files[name] = hasher.hexdigest()
        nonfinite = _check(written, read_back, recomputed)
        digests = Digests(written, files, {path: result.result() for path, result in sources.items()}, nonfinite)
    finally:
        stop.set()
        reader.shutdown(cancel_futures=True)
        release_files()
    for name, shard in shards.items():
        with safe_open(folder / name, framework="pt") as file:
            if set(file.keys()) != set(shard):
                raise InputError(f"{name} was read back with other keys than were written; try again.")
    if len(shards) > 1:
        weight_map = {key: name for name, shard in shards.items() for key in shard}
        total_size = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return digests


def digest_of(tensor: OutputTensor) -> str:
    """XXH3 (128 bits) of a tensor's bytes."""
    return _digest(tensor.read_bytes(), Event())


def _digest(pieces: Iterable, stop: Event) -> str:
    hasher = xxh3_128()
    for piece in pieces:
        if stop.is_set():
            break
        hasher.update(piece)
    return hasher.hexdigest()


def _digest_and_nonfinite(pieces: Iterable, dtype: torch.dtype, stop: Event) -> tuple[str, int]:
    """The digest of a tensor's bytes, and the number of its values that are NaN or infinite."""
    hasher, num_nonfinite = xxh3_128(), 0
    for piece in pieces:
        if stop.is_set():
            break
        hasher.update(piece)
        num_nonfinite += piece.nbytes // dtype.itemsize - int(torch.frombuffer(piece, dtype=dtype).isfinite().sum())
    return hasher.hexdigest(), num_nonfinite


def _check(written: dict[str, str], read_back: dict[str, Future], recomputed: dict[str, Future]) -> dict[str, int]:
    """Compare the digests of what was written with those of what was read; returns the numbers of nonfinite values."""
    nonfinite = {}
    for key, result in read_back.items():
        digest, num_nonfinite = result.result()
        if digest != written[key]:
            raise InputError(f"{key!r} was read back with other bytes than were written; try again.")
        if num_nonfinite:
            nonfinite[key] = num_nonfinite
    for key, result in recomputed.items():
        if result.result() != written[key]:
            raise InputError(f"{key!r} was computed twice with different results; try again.")
    return nonfinite


def _write_tensor(file: BinaryIO, file_hasher: xxh3_128, tensor: OutputTensor, progress: Callable[[int], None]) -> str:
    """Write a tensor; returns the digest of its bytes, as they came from the source."""
    hasher = xxh3_128()
    for piece in tensor.read_bytes():
        for start in range(0, len(piece), CHUNK_BYTES):
            chunk = piece[start : start + CHUNK_BYTES]
            hasher.update(chunk)
            file_hasher.update(chunk)
            _write(file, chunk)
        progress(len(piece))
    return hasher.hexdigest()


def _write(file: BinaryIO, data) -> None:
    while data:  # an unbuffered file may take only a part
        data = data[file.write(data) :]


def _shards(tensors: Mapping[str, OutputTensor]) -> dict[str, dict[str, OutputTensor]]:
    """The tensors of each file, by its name."""
    shards: list[dict[str, OutputTensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.num_bytes
    # wider types first, so that each tensor is aligned to its type
    shards = [dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)) for shard in shards]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def _header(shard: dict[str, OutputTensor]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and the position of each tensor in the file."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
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
