# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight files that `torch.save` wrote.

They are read by torch's `weights_only` unpickler, which runs no code. Their structure is checked first: the records of
the zip file must be laid out as `torch.save` does it, and each tensor must lie inside its record. Otherwise a small
file could take gigabytes of memory, or torch could read other bytes than those that were checked.
"""

import pickletools
import re
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch

from ..utils.errors import InputError, one_line
from .stored import MAX_HEADER_BYTES, StoredTensor, is_zip, load_pickle, load_tensor, release_files


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    release_files()  # the file may have been replaced since it was loaded
    in_zip = is_zip(path)
    record_ends = _check_zip(path) if in_zip else _check_legacy(path)
    with torch.device("cpu"):
        state = load_pickle(path, map_location="meta", mmap=True) if in_zip else load_pickle(path, mmap=False)
    is_state_dict = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in state.items()
    )
    if not is_state_dict:
        raise InputError(f"{path} holds a {type(state).__name__} that is not a flat dict of names and tensors.")
    tensors = {}
    for key, tensor in state.items():
        if tensor.is_quantized:
            raise InputError(f"{key!r} in {path} is quantized; use the float checkpoint that it was made from.")
        start, storage_bytes = _storage_offset(tensor), tensor.untyped_storage().nbytes()
        if start is not None and start not in record_ends:  # torch computes the position that it would have chosen
            raise InputError(f"{path} was packed by another program; load it with torch.load and save it again.")
        is_past_end = start is not None and start + storage_bytes > record_ends[start]
        if is_past_end or tensor.nbytes > storage_bytes:  # an expanded tensor, whose values share memory
            raise InputError(f"{key!r} in {path} reaches past the end of its data; download the file again.")
        offset = None
        if start is not None and tensor.is_contiguous() and not tensor.is_neg():
            offset = start + tensor.storage_offset() * tensor.dtype.itemsize
        elif load_tensor(path, key).device.type != "cpu":
            raise InputError(f"{key!r} in {path} was saved without its values.")
        tensors[key] = StoredTensor(path, key, tensor.dtype, tuple(tensor.shape), offset)
    return tensors


def _storage_offset(tensor: torch.Tensor) -> int | None:
    """The position of a tensor's storage in its file. torch.load knows it since 2.10; None before."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)  # private, seen in torch 2.13 to 2.14


def _check_zip(path: Path) -> dict[int, int]:
    """The end of each record of a zip file, by its beginning.

    No record may be compressed or overlap another, and no name may occur twice. The directory must lie where every
    reader looks for it: otherwise torch might read another one than is checked here.

    Raises:
        InputError: the file breaks one of these rules.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            count = _check_directory(file, path.stat().st_size)
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            if len(infos) != count:
                raise ValueError(f"its directory has {len(infos)} records and should have {count}")
            if len({info.filename.lower() for info in infos}) < len(infos):
                raise ValueError("two records have one name")
            records: dict[int, int] = {}
            end = 0
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
                    if info.file_size > MAX_HEADER_BYTES:
                        raise ValueError(f"the record {info.filename} has {info.file_size:,} bytes")
                    _check_pickles(archive.read(info), 1)
                if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                    raise InputError(f"{path} was written on a big-endian machine; save it again on this one.")
    # zipfile raises NotImplementedError for a compression or a version that it does not support
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not as torch.save writes it: {one_line(error)}; it was not loaded. If you trust the file, "
            f"load it with torch.load and save it again."
        ) from None
    return records


def _check_directory(file: BinaryIO, num_bytes: int) -> int:
    """The number of records in the directory.

    The directory must end where its end record begins, and that record must end the file. A zip64 file has both
    records twice, and both must say the same.
    """
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
    if offset + size != end or size > MAX_HEADER_BYTES:
        raise ValueError("its directory is not where it should be")
    return count


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """The position of a record's data. The record has a header of its own, which must agree with the directory."""
    file.seek(info.header_offset)
    header = file.read(30)
    signature, _, flags, method, _, _, _, packed, size, name_bytes, extra_bytes = struct.unpack("<4s5H3L2H", header)
    sizes = {info.file_size, 2**32 - 1} | ({0} if flags & 8 else set())  # flag 8: the sizes follow the data
    if signature != b"PK\x03\x04" or method != 0 or file.read(name_bytes) != info.filename.encode():
        raise ValueError(f"the record {info.filename} is another one than the directory says")
    if not {packed, size} <= sizes:
        raise ValueError(f"the record {info.filename} has another size than the directory says")
    return info.header_offset + 30 + name_bytes + extra_bytes


def _check_legacy(path: Path) -> dict[int, int]:
    """Check a file of torch.save before 1.6: four pickles, the names of the storages, then their data."""
    with open(path, "rb") as file:
        head = file.read(MAX_HEADER_BYTES)
    try:
        _check_pickles(head, 5)
    except ValueError as error:
        raise InputError(f"{path} cannot be read: it is truncated or no PyTorch file: {one_line(error)}") from None
    return {}


def _check_pickles(data: bytes, number: int) -> None:
    """Parse pickles without executing them.

    torch's unpickler allows some calls that allocate as many bytes as a number in the file says.

    Raises:
        ValueError: there is such a call, or the data is no pickle or too large.
    """
    file = BytesIO(data)
    for index in range(number):
        if index and file.tell() == len(data):
            return
        for _, argument, _ in pickletools.genops(file):
            if isinstance(argument, str) and re.fullmatch(r"\w+ bytearray|torch[\w.]* \w*Tensor", argument):
                raise ValueError(f"its pickle calls {argument.replace(' ', '.')}")
