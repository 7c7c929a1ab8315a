# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The weights of a model folder: keys, types, shapes and positions of its tensors, without their values.

Files are not trusted: a shard must lie in the folder, and a tensor inside its file.
"""

import json
import re
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..utils.errors import InputError, one_line
from ..utils.files import read_json, without_duplicates
from .pickles import read_pickle
from .stored import MAX_HEADER_BYTES, StoredTensor

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


def read_weight_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file or of one written by `torch.save`.

    Raises:
        InputError: the file is missing, truncated, inconsistent, or would run code if it were unpickled.
    """
    if not path.is_file():
        raise InputError(f"{path.name} is missing in {path.parent}; download or copy it again.")
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{path} is a Git LFS pointer and not the weights; run `git lfs pull` there.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {header_bytes:,} bytes, of at most {MAX_HEADER_BYTES:,}")
            with safe_open(path, framework="pt"):  # refuses holes, overlaps, wrong lengths and ranges past the end
                pass
            header = json.loads(file.read(header_bytes), object_pairs_hook=without_duplicates)
    except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
        raise InputError(f"{path} is not a whole safetensors file: {one_line(error)}") from None
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise InputError(
                f"{key!r} in {path} has the type {entry['dtype']}: quantized weights cannot be converted; use the "
                f"float checkpoint that they were made from."
            )
        offset = 8 + header_bytes + entry["data_offsets"][0]
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        tensors[key] = StoredTensor(path, key, dtype, tuple(entry["shape"]), offset)
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """The name of the shard of each key, from an index file.

    Raises:
        InputError: the map is malformed, or a shard's name would leave the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"weight_map in {index} is not an object of keys and file names.")
    for name in weight_map.values():
        if not re.fullmatch(r"[^/\\:\0]+\.(safetensors|bin)", name):
            raise InputError(f"{index} names the shard {name!r}; shards must be files in the same folder.")
    return weight_map


def weight_entry(folder: Path) -> Path | None:
    """The weight file of a model folder, or the index of its shards; None if there is neither. The order of preference
    is that of transformers."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards of a model folder.

    Raises:
        InputError: a shard is missing or broken, index and shards disagree, or two shards have one key.
    """
    index = weight_entry(folder)
    if index is None:
        raise InputError(
            f"{folder} holds no weights: no model.safetensors or pytorch_model.bin, whole or in shards, and no "
            f"mm_projector.bin or adapter_config.json of LLaVA's code."
        )
    if index.suffix != ".json":
        return read_weight_file(index)
    weight_map = read_weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        for key, tensor in read_weight_file(folder / shard).items():
            if key in tensors:
                raise InputError(f"{key!r} is a duplicate: it is in {tensors[key].path.name} and in {shard}.")
            tensors[key] = tensor
    for key in weight_map.keys() | tensors.keys():
        listed, held = weight_map.get(key), tensors[key].path.name if key in tensors else None
        if listed != held:
            raise InputError(
                f"{index.name} and the shards disagree about {key!r}: {listed or 'not listed'} in the index, "
                f"{f'held by {held}' if held else 'in no shard'}."
            )
    return tensors
