# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A LLaVA checkpoint under DeCo's names, and the checks that every format shares."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..configuration_deco import DecoConfig, check_grid, fit_grid
from ..modeling_deco import DecoForConditionalGeneration
from ..utils.errors import InputError, as_input_errors, wrap_errors
from .layouts import TIED, UNUSED_HEAD, UNUSED_LAYER, Layout, layer_index
from .sources import Source
from .stored import StoredTensor
from .tensors import SourceTensor
from .writing import digest_of

EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


@dataclass
class LlavaCheckpoint:
    """A LLaVA checkpoint under DeCo's names.

    Attributes:
        format: the name of its format, for messages and the report.
        config: DeCo's config of it. A reader sets it when it knows the tensors.
        sources: the folders that it is read from, by role; "source" is the checkpoint itself.
        tensors: a tensor for each parameter of the model.
        dropped: keys that the model does not need, with the reason.
        tokenizer: the source that has the tokenizer.
        image_processor: the source that has the image processor.
        files: the weight files of the tensors.
        is_trained_pooled: it was trained with average pooling, so it is a DeCo.
        image_aspect_ratio: that of the original code's config.
        extra_tokens: tokens that the original code adds to the tokenizer, in its order.
        video_token_id: that of the source's config.
    """

    format: str
    config: DecoConfig = field(init=False)
    sources: dict[str, Source]
    tensors: dict[str, SourceTensor]
    dropped: dict[str, str]
    tokenizer: Source
    image_processor: Source
    files: set[Path] = field(default_factory=set)
    is_trained_pooled: bool = False
    image_aspect_ratio: str | None = None
    extra_tokens: list[str] = field(default_factory=list)
    video_token_id: int | None = None


def add_tensors(
    checkpoint: LlavaCheckpoint,
    stored: dict[str, StoredTensor],
    layout: Layout,
    projector_type=None,
    may_replace: bool = False,
) -> None:
    added: dict[str, StoredTensor] = {}
    named = f" (mm_projector_type {projector_type!r})" if projector_type else ""
    checkpoint.files |= {tensor.path for tensor in stored.values()}
    for key, tensor in stored.items():
        name, reason = layout.rename(key)
        where = f"{tensor.path.name} of {tensor.path.parent}"
        if reason is not None:
            checkpoint.dropped[key] = reason
        elif name is None and re.search(r"projector|resampler", key):
            raise InputError(f"{key!r} in {where}: the projector{named} is not Linear-GELU-Linear, as DeCo's is.")
        elif name is None:
            raise InputError(f"{key!r} in {where} is an unknown key.")
        elif name in added or (name in checkpoint.tensors and not may_replace):
            other = added.get(name) or checkpoint.tensors[name]
            raise InputError(f"{key!r} in {where} is a duplicate of {other.key!r}: both are {name!r}.")
        elif not tensor.dtype.is_floating_point:
            raise InputError(f"{key!r} in {where} is {tensor.dtype}; weights must be float.")
        else:
            added[name] = tensor
    checkpoint.tensors |= added


def build_config(pooled_grid_size, grid_name="--pooled-grid-size", **fields) -> DecoConfig:
    """The config at a grid. Default: 12 x 12, or a quarter of the patches if that is more (14 x 14 of 27 x 27)."""
    patch_grid = DecoConfig(**fields, pooled_grid_size=1).patch_grid
    if pooled_grid_size is None:
        rows, cols = fit_grid((max(12, -(-patch_grid[0] // 2)), max(12, -(-patch_grid[1] // 2))), patch_grid)
    else:
        with as_input_errors():
            rows, cols = check_grid(pooled_grid_size, patch_grid, name=grid_name)
    return DecoConfig(**fields, pooled_grid_size=rows if rows == cols else [rows, cols])


def check_complete(checkpoint: LlavaCheckpoint) -> None:
    """Drop tensors that the model does not have, and check that all others are there, in the model's shapes."""
    config, tensors, source = checkpoint.config, checkpoint.tensors, checkpoint.sources["source"]
    model_type = config.vision_config.model_type
    if model_type.startswith("dinov2") or config.feature_map is not None:
        raise InputError(f"The vision tower of {source.name} is a {model_type}; use a CLIP or a SigLIP.")
    for part, part_config in (("vision_tower", config.vision_config), ("language_model", config.text_config)):
        num_layers = len({layer_index(name, part) for name in tensors} - {None})
        if part_config.num_hidden_layers > num_layers:  # checked before a model of a million layers is built
            raise InputError(
                f"{source.name} is not complete: its config has {part_config.num_hidden_layers} layers of the {part}, "
                f"and its weights have {num_layers}: layers.{num_layers} or an earlier one is missing."
            )
    if config.tie_word_embeddings and not _is_tied(tensors):
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    shapes = parameter_shapes(config, source)
    for name in [name for name in tensors if name not in shapes]:
        key, layer = tensors[name].key, layer_index(name, "vision_tower")
        if layer is not None and layer >= config.vision_config.num_hidden_layers:
            checkpoint.dropped[key] = UNUSED_LAYER
        elif name.startswith("model.vision_tower.head."):
            checkpoint.dropped[key] = UNUSED_HEAD
        elif name == "lm_head.weight":
            checkpoint.dropped[key] = TIED
        else:
            raise InputError(f"{key!r} in {tensors[name].path} is an unknown key: the model has no {name!r}.")
        del tensors[name]
    check_shapes(tensors, shapes, checkpoint.sources)


def _is_tied(tensors: dict[str, SourceTensor]) -> bool:
    """Whether `lm_head` is the embeddings, as the config says. If both are stored, transformers takes both."""
    embeddings, head = (tensors.get(name) for name in EMBEDDINGS)
    return embeddings is None or head is None or digest_of(embeddings) == digest_of(head)


def parameter_shapes(config: DecoConfig, source: Source) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that a checkpoint of the config has."""
    with wrap_errors(f"config.json of {source.name}"), torch.device("meta"):
        model = DecoForConditionalGeneration(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_shapes(
    tensors: Mapping[str, SourceTensor], shapes: dict[str, tuple[int, ...]], sources: dict[str, Source]
) -> None:
    """Refuse a checkpoint that lacks a parameter or has one in another shape. The message has both shapes."""
    name_of_source = sources["source"].name
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise InputError(
            f"{name_of_source} is not complete: {len(missing)} parameters are missing, such as {missing[0]!r}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            role = next(role for role, source in sources.items() if source.folder == tensor.path.parent)
            hint = "" if role == "source" else f"; name the right one by --{role.replace('_', '-')}"
            raise InputError(
                f"{tensor.key!r} in {tensor.path} has the shape {tensor.shape}, and the config of {name_of_source} "
                f"wants {shapes[name]}{hint}."
            )
