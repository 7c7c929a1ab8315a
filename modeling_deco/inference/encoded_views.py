# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The vision tower's output, taken or replaced: what encodes a picture once serves every grid."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .costs import now


@dataclass(frozen=True, eq=False)
class EncodedViews:
    """The vision tower's output for the views of a call, and the time that it took."""

    patch_features: torch.Tensor  # (num_views, num_patches, vision_hidden_size)
    seconds: float


@contextmanager
def replaced_tower(deco: PreTrainedModel, encode_views: Callable) -> Iterator[None]:
    """While the block runs, images and videos are encoded by a function in place of `DecoModel.encode_views`.

    Args:
        deco: a `DecoModel`.
        encode_views: takes the tower's inputs and returns what `DecoModel.encode_views` does.
    """
    deco.encode_views = encode_views
    try:
        yield
    finally:
        del deco.encode_views  # the instance's attribute; the class has its own


def timed_tower(deco: PreTrainedModel, tower_inputs: dict[str, Any], **kwargs) -> tuple[Any, EncodedViews]:
    """The output of `DecoModel.encode_views`, and what to keep of it."""
    start = now(tower_inputs["pixel_values"])
    outputs, patch_features = type(deco).encode_views(deco, tower_inputs, **kwargs)
    return outputs, EncodedViews(patch_features, now(patch_features) - start)


def project(deco: PreTrainedModel, patch_features: torch.Tensor, **image_inputs) -> list[torch.Tensor]:
    """The tokens of images at another grid, from the vision tower's output.

    Args:
        image_inputs: arguments of `DecoModel.get_image_features`. Of `pixel_values` only the shape is read.
    """
    with replaced_tower(deco, lambda tower_inputs, **kwargs: (BaseModelOutputWithPooling(), patch_features)):
        return deco.get_image_features(**image_inputs, return_dict=True).pooler_output
