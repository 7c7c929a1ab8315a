# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether the stored weights of a checkpoint are those of its config, by names and shapes alone."""

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
from ..modeling_deco import DecoForConditionalGeneration
from ..utils.errors import first_names, one_line
from .errors import named_errors
from .lookup import checkpoint_name, find_file


def check_weights(name: str, revision: str | None, config: DecoConfig) -> None:
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
    names = {}  # of each parameter, which has several where weights are tied
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    tied = {key for keys in names.values() for key in keys if not stored.isdisjoint(keys)}
    missing, unexpected = expected.keys() - stored - tied, stored - expected.keys()
    mismatched = {
        key: (shape, tuple(expected[key].shape))
        for key, shape in renamed.items()
        if key in expected and tuple(expected[key].shape) != shape
    }
    if getattr(config, "quantization_config", None) is not None:  # whose method gives tensors names and shapes
        modules = {key.rpartition(".")[0] for key in stored}
        missing = {key for key in missing if key.rpartition(".")[0] not in modules}
        mismatched, unexpected = {}, ()
    check_tensors(name, len(expected), missing, mismatched, unexpected)


def check_tensors(name, num_tensors, missing, mismatched, unexpected) -> None:
    if missing:
        raise ValueError(
            f"{name} has no weights for {len(missing)} of the model's {num_tensors} tensors: {first_names(missing)}."
        )
    if mismatched:
        shapes = [f"{key} is {list(stored)}, not {list(right)}" for key, (stored, right) in mismatched.items()]
        raise ValueError(
            f"{name} has {len(mismatched)} tensors of another shape than its config.json says: {first_names(shapes)}."
        )
    # a LLaVA's tower may be used as it is: it has layers that DeCo does not read
    unexpected = [key for key in unexpected if "vision_tower." not in key]
    if unexpected:
        raise ValueError(
            f"{name} has {len(unexpected)} tensors that the model of its config.json has no place for: "
            f"{first_names(unexpected)}."
        )


def empty_model(config: DecoConfig) -> DecoForConditionalGeneration:
    """The model of a config, without memory for its weights."""
    with torch.device("meta"):
        return DecoForConditionalGeneration(config)


def _renamed(model, shapes: dict[str, tuple]) -> tuple[dict[str, tuple], set[str]]:
    """Names of stored tensors as the model has them.

    Returns:
        The shapes of the tensors that are stored as the model has them, by name; and the names of those that are
        joined from several stored tensors (experts).
    """
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
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


def _shapes_of(name: str, revision: str | None) -> dict[str, tuple] | None:
    """Names and shapes of a checkpoint's weights; None where they are on the Hub, which cannot be asked."""
    path = checkpoint_name(name)
    if os.path.isdir(path):
        return stored_shapes(name, path)
    snapshot = os.path.dirname(find_file(name, "config.json", revision))
    with suppress(ValueError):  # not fetched, or not all of it
        return stored_shapes(name, snapshot)
    if is_offline_mode():
        return None
    with named_errors(name):
        files = get_safetensors_metadata(path, revision=revision).files_metadata.values()
    return {key: tuple(tensor.shape) for file in files for key, tensor in file.tensors.items()}


def stored_shapes(name: str, folder: str) -> dict[str, tuple]:
    """Names and shapes of the weights in a folder, from the heads of its safetensors files.

    Args:
        name: the checkpoint's, for messages.

    Raises:
        ValueError: there are no weights, a file is missing or damaged.
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
    shapes = {}
    for file in files:
        try:
            with safe_open(os.path.join(folder, file), "pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} of {name} is damaged, or not all of it is there: {one_line(error)}") from None
    return shapes
