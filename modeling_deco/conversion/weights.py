# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Tensors where they lie: the keys, types, shapes and byte ranges of weight files, without reading a tensor.

Nothing that a file says is believed: shard names stay inside the folder, byte ranges inside the file, and pickles are
read by torch's `weights_only` unpickler, which runs no code.
"""

import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..utils.errors import ConversionError, one_line
from ..utils.files import read_json, without_duplicates

_MAX_HEADER_BYTES = 16 << 20  # of what is parsed; that of a model of 13 billion parameters has 0.1 MB
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
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > _MAX_HEADER_BYTES:
                raise ValueError(f"its header has {header_bytes:,} bytes, of at most {_MAX_HEADER_BYTES:,}")
            with safe_open(path, framework="pt"):  # refuses holes, overlaps, ranges past the end and lengths that lie
                pass
            header = json.loads(file.read(header_bytes), object_pairs_hook=without_duplicates)
    except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
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
    is_zip = _is_zip(path)
    record_ends = _check_zip(path) if is_zip else _check_legacy(path)
    with torch.device("cpu"):
        state = _load(path, map_location="meta", mmap=True) if is_zip else _load(path, mmap=False)
    is_state_dict = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in state.items()
    )
    if not is_state_dict:
        raise ConversionError(f"{path} holds a {type(state).__name__} that is not a flat dict of names and tensors.")
    tensors = {}
    for key, tensor in state.items():
        if tensor.is_quantized:
            raise ConversionError(f"{key!r} in {path} is quantized; use the float checkpoint that it was made from.")
        start, storage_bytes = _storage_offset(tensor), tensor.untyped_storage().nbytes()
        if start is not None and start not in record_ends:  # torch computes where it would have put it
            raise ConversionError(f"{path} was packed by another program; load it with torch.load and save it again.")
        is_past_end = start is not None and start + storage_bytes > record_ends[start]
        if is_past_end or tensor.nbytes > storage_bytes:  # or one value stands for many
            raise ConversionError(f"{key!r} in {path} reaches past the end of its data; download the file again.")
        offset = None
        if start is not None and tensor.is_contiguous() and not tensor.is_neg():
            offset = start + tensor.storage_offset() * tensor.dtype.itemsize
        elif _load_tensor(path, key).device.type != "cpu":
            raise ConversionError(f"{key!r} in {path} was saved without its values.")
        tensors[key] = StoredTensor(path, key, tensor.dtype, tuple(tensor.shape), offset)
    return tensors


def _storage_offset(tensor: torch.Tensor) -> int | None:
    """Where in its file a tensor's storage begins. torch.load says so since 2.10; before, torch reads the tensor."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)  # private, seen in torch 2.13 to 2.14


def _load_tensor(path: Path, key: str) -> torch.Tensor:
    return _load(path, mmap=_is_zip(path))[key].resolve_neg()


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


def _is_zip(path: Path) -> bool:
    """Whether a file is what torch.save has written since 1.6, as torch.load tells; else the whole file is loaded."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_zip(path: Path) -> dict[int, int]:
    """Where the records of a zip file begin and end, each as it lies in the file: none compressed, none over another,
    none twice. The directory lies where every reader looks for it: else torch might read another than is checked."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            count = _check_directory(file, path.stat().st_size)
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            if len(infos) != count:
                raise ValueError(f"its directory has {len(infos)} records and should have {count}")
            if len({info.filename.lower() for info in infos}) < len(infos):
                raise ValueError("two records have one name")
            records, end = {}, 0
            for info in infos:
                is_plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
                if not is_plain or info.flag_bits & 0x2041:  # encrypted, in one of three ways
                    raise ValueError(f"the record {info.filename} is compressed or encrypted")
                if not info.filename.isascii() or info.orig_filename != info.filename:
                    raise ValueError(f"a record is called {info.orig_filename!r}")
                if info.header_offset < end or (not records and info.header_offset > 0):
                    raise ValueError(
                        f"the record {info.filename} lies over another one or is hidden behind other data"
                    )
                start = _data_offset(file, info)
                end = start + info.file_size
                records[start] = end
                if end > archive.start_dir:
                    raise ValueError(f"the record {info.filename} is larger than the file")
                if info.filename.endswith("/data.pkl"):
                    if info.file_size > _MAX_HEADER_BYTES:
                        raise ValueError(f"the record {info.filename} has {info.file_size:,} bytes")
                    _check_pickles(archive.read(info), 1)
                if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                    raise ConversionError(f"{path} was written on a big-endian machine; save it again on this one.")
    # zipfile raises NotImplementedError for a compression or a version that it does not know
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"{path} is not as torch.save writes it: {one_line(error)}; it was not loaded. Where you trust it, load "
            f"it with torch.load and save it again."
        ) from None
    return records


def _check_directory(file: BinaryIO, num_bytes: int) -> int:
    """The number of records in the directory. It must end where its end record begins, which ends the file; what is
    said twice (zip64) must be the same."""
    file.seek(max(0, num_bytes - 98))
    tail = file.read(98)
    signature, *disks, count, size, offset, comment_bytes = struct.unpack("<4s4H2LH", tail[-22:])
    if signature != b"PK\x05\x06" or comment_bytes or disks != [0, 0, count]:
        raise ValueError("something follows its directory")
    end = num_bytes - 22
    if tail[-42:-38] == b"PK\x06\x07":
        fields = struct.unpack("<4sQ2H2L4Q4sLQL", tail[-98:-22])
        signature, same_count, long_count, long_size, long_offset = fields[0], *fields[6:10]
        end = num_bytes - 98
        if signature != b"PK\x06\x06" or fields[1] != 44 or fields[12] != end or same_count != long_count:
            raise ValueError("its zip64 directory is not before its end")
        short = [(count, long_count, 0xFFFF), (size, long_size, 2**32 - 1), (offset, long_offset, 2**32 - 1)]
        if any(value not in (long, unset) for value, long, unset in short):
            raise ValueError("its two directories differ")
        count, size, offset = long_count, long_size, long_offset
    if offset + size != end or size > _MAX_HEADER_BYTES:
        raise ValueError("its directory is not where it should be")
    return count


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a record's data begins: its own header must agree with the directory, whose lengths differ from it."""
    file.seek(info.header_offset)
    header = file.read(30)
    signature, _, flags, method, _, _, _, packed, size, name_bytes, extra_bytes = struct.unpack("<4s5H3L2H", header)
    sizes = {info.file_size, 2**32 - 1} | ({0} if flags & 8 else set())  # 8: said behind the data
    if signature != b"PK\x03\x04" or method != 0 or file.read(name_bytes) != info.filename.encode():
        raise ValueError(f"the record {info.filename} is another one than the directory says")
    if not {packed, size} <= sizes:
        raise ValueError(f"the record {info.filename} has another size than the directory says")
    return info.header_offset + 30 + name_bytes + extra_bytes


def _check_legacy(path: Path) -> dict[int, int]:
    """What torch.save wrote before 1.6: four pickles, the names of the tensors' data, then the data."""
    with open(path, "rb") as file:
        head = file.read(_MAX_HEADER_BYTES)
    try:
        _check_pickles(head, 5)
    except ValueError as error:
        raise ConversionError(
            f"{path} cannot be read, it is truncated or no PyTorch file: {one_line(error)}"
        ) from None
    return {}


def _check_pickles(data: bytes, number: int) -> None:
    """Read pickles without obeying them. torch's unpickler allows some calls that make gigabytes of a number.

    Raises:
        ValueError: they do so, or are no pickles or too large.
    """
    file = BytesIO(data)
    for index in range(number):
        if index and file.tell() == len(data):
            return
        for _, argument, _ in pickletools.genops(file):
            if isinstance(argument, str) and re.fullmatch(r"\w+ bytearray|torch[\w.]* \w*Tensor", argument):
                raise ValueError(f"its pickle calls {argument.replace(' ', '.')}")


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
