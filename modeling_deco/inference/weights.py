# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare the names and shapes of stored weights with the model of a config, without reading the weights."""

import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata, is_offline_mode
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping  # private, seen in transformers 5.19 to 5.24
from transformers.core_model_loading import (  # private, seen in transformers 5.19 to 5.24
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_deco import DecoConfig
from ..llava import KEY_MAPPING
from ..modeling_deco import DecoForConditionalGeneration
from ..utils.errors import first_names, one_line
from .errors import named_errors
from .lookup import checkpoint_name, find_file


def check_weights(name: str | os.PathLike, revision: str | None, config: DecoConfig) -> None:
    """Compare the names and shapes of a checkpoint's weights with the model of its config. No weights are read.

    Raises:
        ValueError: weights are missing, have another shape, or have no place in the model.
    """
    shapes = _shapes_of(name, revision)
    if shapes is None:
        return
    model = empty_model(config)
    expected = model.state_dict()
    renamed, converted = _renamed(model, shapes)
    stored = renamed.keys() | converted
    names: dict[int, list[str]] = {}  # names of each parameter; tied weights have several
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    tied = {key for keys in names.values() for key in keys if not stored.isdisjoint(keys)}
    missing, unexpected = expected.keys() - stored - tied, stored - expected.keys()
    mismatched = {
        key: (shape, tuple(expected[key].shape))
        for key, shape in renamed.items()
        if key in expected and tuple(expected[key].shape) != shape
    }
    if getattr(config, "quantization_config", None) is not None:  # quantized tensors have other names and shapes
        modules = {key.rpartition(".")[0] for key in stored}
        missing = {key for key in missing if key.rpartition(".")[0] not in modules}
        mismatched, unexpected = {}, ()
    check_tensors(name, len(expected), missing, mismatched, unexpected)


def check_tensors(name: str | os.PathLike, num_tensors, missing, mismatched, unexpected) -> None:
    if missing:
        raise ValueError(
            f"{name} has no weights for {len(missing)} of the model's {num_tensors} tensors: {first_names(missing)}."
        )
    if mismatched:
        shapes = [f"{key} is {list(stored)}, not {list(right)}" for key, (stored, right) in mismatched.items()]
        raise ValueError(
            f"{name} has {len(mismatched)} tensors whose shape differs from its config.json: {first_names(shapes)}."
        )
    # the unchanged vision tower of a LLaVA has layers that DeCo does not use; older versions also saved frequencies
    unexpected = [key for key in unexpected if "vision_tower." not in key and not key.endswith("rotary_emb.inv_freq")]
    if unexpected:
        raise ValueError(
            f"{name} has {len(unexpected)} tensors that are not in the model of its config.json: "
            f"{first_names(unexpected)}."
        )


def empty_model(config: DecoConfig) -> DecoForConditionalGeneration:
    """Build the model of a config without memory for its weights."""
    with torch.device("meta"):
        return DecoForConditionalGeneration(config)


def _renamed(model, shapes: dict[str, tuple]) -> tuple[dict[str, tuple], set[str]]:
    """Translate the names of stored tensors to the model's names.

    Returns:
        The shapes by name of the tensors that are stored one to one, and the names of the tensors that are joined from
        several stored tensors (experts).
    """
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model, KEY_MAPPING)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamed, converted = {}, set()
    for key, shape in shapes.items():
        new_key, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if new_key not in expected and key in expected:
            new_key, pattern = key, None
        if pattern is None:
            renamed[new_key] = shape
        else:
            converted.add(new_key)
    return renamed, converted


def _shapes_of(name: str | os.PathLike, revision: str | None) -> dict[str, tuple] | None:
    """Names and shapes of the weights of a checkpoint. None if they are on the Hub and the machine is offline."""
    path = checkpoint_name(name)
    if os.path.isdir(path):
        return stored_shapes(name, path)
    config_file = find_file(name, "config.json", revision)
    if config_file is None:
        raise ValueError(f"{name} is not a model: it has no config.json.")
    snapshot = os.path.dirname(config_file)
    with suppress(ValueError):  # not downloaded, or incomplete
        return stored_shapes(name, snapshot)
    if is_offline_mode():
        return None
    with named_errors(name):
        files = get_safetensors_metadata(path, revision=revision).files_metadata.values()
    return {key: tuple(tensor.shape) for file in files for key, tensor in file.tensors.items()}


def stored_shapes(name: str | os.PathLike, folder: str) -> dict[str, tuple]:
    """Read the names and shapes of the weights in a folder from the headers of its safetensors files.

    Args:
        name: name of the checkpoint in messages.

    Raises:
        ValueError: there are no weights, or a file is missing or damaged.
    """
    files = [SAFE_WEIGHTS_NAME]
    if not os.path.exists(os.path.join(folder, SAFE_WEIGHTS_NAME)):
        index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
        if not os.path.exists(index):
            raise ValueError(f"{name} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
        with named_errors(name):
            files = sorted(set(json.loads(Path(index).read_bytes())["weight_map"].values()))
            for file in files:
                if os.path.basename(file) != file:
                    raise ValueError(f"its {SAFE_WEIGHTS_INDEX_NAME} names {file!r}, which is not a file beside it.")
    absent = [file for file in files if not os.path.exists(os.path.join(folder, file))]
    if absent:
        raise ValueError(
            f"{name} lacks {len(absent)} of the {len(files)} files that its {SAFE_WEIGHTS_INDEX_NAME} names: "
            f"{first_names(absent)}."
        )
    shapes: dict[str, tuple] = {}
    for file in files:
        try:
            with safe_open(os.path.join(folder, file), "pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} of {name} is damaged or incomplete: {one_line(error)}") from None
    return shapes
