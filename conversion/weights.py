# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tensors where they lie: the keys, types, shapes and byte ranges of weight files, without reading a tensor.

Nothing that a file says is believed: shard names stay inside the folder, byte ranges inside the file, and pickles are
read by torch's `weights_only` unpickler, which runs no code.
"""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import one_line
from .errors import ConversionError
from .files import read_json, without_duplicates

CHUNK_BYTES = 256 << 10  # stays in the processor's cache between reading, hashing and writing

# safetensors' names; other types (8-bit floats, 4-bit) belong to quantized checkpoints.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    `offset` is where its bytes begin; None where they are not in one piece (a transposed view), and torch reads it.
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
        """The tensor's bytes in pieces; each piece is overwritten by the next."""
        if self.offset is None:
            yield to_bytes(_load_tensor(self.path, self.key))
            return
        yield from read_range(self.path, self.offset, self.num_bytes)

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The tensor, or its rows `first` to `last`."""
        if self.offset is None:
            return _load_tensor(self.path, self.key)[first:last].clone()
        rows = self.shape[0] if last is None else min(last, self.shape[0])
        row_bytes = self.num_bytes // self.shape[0]
        data = bytearray((rows - first) * row_bytes)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + first * row_bytes)
            _read_into(file, memoryview(data))
        return torch.frombuffer(data, dtype=self.dtype).view(rows - first, *self.shape[1:])


def read_range(path: Path, offset: int, num_bytes: int) -> Iterator[memoryview]:
    """A byte range of a file, in pieces; each piece is overwritten by the next."""
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
            raise ConversionError(f"{Path(file.name).name} became shorter while it was read; is something writing it?")
        filled += num_read


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row by row."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def read_weight_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file or of one written by `torch.save`.

    Raises:
        ConversionError: the file is missing, truncated, inconsistent, or would run code if it were unpickled.
    """
    if not path.is_file():
        raise ConversionError(f"{path.name} is missing in {path.parent}; download or copy it again.")
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ConversionError(f"{path} is a Git LFS pointer and not the weights; run `git lfs pull` there.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt"):  # refuses holes, overlaps, ranges past the end and lengths that lie
            pass
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes), object_pairs_hook=without_duplicates)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path} is not a whole safetensors file: {one_line(error)}") from None
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ConversionError(
                f"{key!r} in {path} has the type {entry['dtype']}: quantized weights cannot be converted; use the "
                f"float checkpoint that they were made from."
            )
        offset = 8 + header_bytes + entry["data_offsets"][0]
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        tensors[key] = StoredTensor(path, key, dtype, tuple(entry["shape"]), offset)
    return tensors


def _read_pickle(path: Path) -> dict[str, StoredTensor]:
    is_zip = zipfile.is_zipfile(path)  # what torch.save has written since 1.6; else the whole file is loaded
    with torch.device("cpu"):
        state = _load(path, map_location="meta", mmap=True) if is_zip else _load(path, mmap=False)
    is_state_dict = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in state.items()
    )
    if not is_state_dict:
        raise ConversionError(f"{path} holds a {type(state).__name__} that is not a flat dict of names and tensors.")
    record_ends = _zip_records(path) if is_zip else {}
    tensors = {}
    for key, tensor in state.items():
        if tensor.is_quantized:
            raise ConversionError(f"{key!r} in {path} is quantized; use the float checkpoint that it was made from.")
        start = _storage_offset(tensor)
        offset = None
        if is_zip and start in record_ends and tensor.is_contiguous() and not tensor.is_neg():
            offset = start + tensor.storage_offset() * tensor.dtype.itemsize
            if offset + tensor.nbytes > record_ends[start]:
                raise ConversionError(f"{key!r} in {path} reaches past the end of its data; download the file again.")
        elif _load_tensor(path, key).device.type != "cpu":
            raise ConversionError(f"{key!r} in {path} was saved without its values.")
        tensors[key] = StoredTensor(path, key, tensor.dtype, tuple(tensor.shape), offset)
    return tensors


def _storage_offset(tensor: torch.Tensor) -> int | None:
    """Where in its file a tensor's storage begins. torch.load says so since 2.10; before, torch reads the tensor."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _load_tensor(path: Path, key: str) -> torch.Tensor:
    return _load(path, mmap=zipfile.is_zipfile(path))[key].resolve_neg()


@lru_cache(maxsize=1)  # legacy files are read whole, and several tensors of a file one after the other
def _load(path: Path, **kwargs):
    try:
        return torch.load(path, weights_only=True, **{"map_location": "cpu", **kwargs})
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"would run code when it is unpickled ({match[1]})" if match else f"is refused: {one_line(error)}"
        raise ConversionError(f"{path} {what}; it was not loaded.") from None
    except Exception as error:  # of many kinds, by what is broken in the file
        raise ConversionError(
            f"{path} cannot be read, it is truncated or no PyTorch file: {one_line(error)}"
        ) from None


def release_files() -> None:
    """Let go of the file that was read last."""
    _load.cache_clear()


def _zip_records(path: Path) -> dict[int, int]:
    """Where the uncompressed records of a zip file begin and end."""
    records = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                raise ConversionError(f"{path} was written on a big-endian machine; save it again on this one.")
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)  # the local header's lengths differ from the directory's
                name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
                start = info.header_offset + 30 + name_bytes + extra_bytes
                records[start] = start + info.file_size
    return records


def read_weight_map(index: Path) -> dict[str, str]:
    """Which shard holds which key, from an index file.

    Raises:
        ConversionError: the map is malformed, or a shard's name would leave the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"weight_map in {index} is not an object of keys and file names.")
    for name in weight_map.values():
        if not re.fullmatch(r"[^/\\:\0]+\.(safetensors|bin)", name):
            raise ConversionError(f"{index} names the shard {name!r}; shards must be files in the same folder.")
    return weight_map


def weight_entry(folder: Path) -> Path | None:
    """The file that says where a model folder's weights are: the only one, or an index of shards; None without any.
    The order is transformers'."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder, of all its shards.

    Raises:
        ConversionError: a shard is missing or broken, index and shards disagree, or a key is there twice.
    """
    index = weight_entry(folder)
    if index is None:
        raise ConversionError(
            f"{folder} holds no weights: no model.safetensors or pytorch_model.bin, whole or in shards, and of "
            f"LLaVA's code no mm_projector.bin and no adapter_config.json."
        )
    if index.suffix != ".json":
        return read_weight_file(index)
    weight_map = read_weight_map(index)
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        for key, tensor in read_weight_file(folder / shard).items():
            if key in tensors:
                raise ConversionError(f"{key!r} is a duplicate: it is in {tensors[key].path.name} and in {shard}.")
            tensors[key] = tensor
    for key in weight_map.keys() | tensors.keys():
        listed, held = weight_map.get(key), tensors[key].path.name if key in tensors else None
        if listed != held:
            raise ConversionError(
                f"{index.name} and the shards disagree about {key!r}: {listed or 'not listed'} in the index, "
                f"{f'held by {held}' if held else 'in no shard'}."
            )
    return tensors
