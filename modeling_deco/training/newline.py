# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The newline of images beside an adapter.

PEFT copies, trains and saves modules, and `image_newline` is a parameter of the model itself. So it is trained in
place where the adapter trains the projector, and saved among the adapter's weights under its own name. PEFT loads it
from there into the base model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .parts import part_of

ADAPTER_WEIGHTS = "adapter_model.safetensors"
NEWLINE = "image_newline"


def newline_of(model: PreTrainedModel) -> tuple[str, nn.Parameter] | None:
    """The name and the newline of a model with PEFT's wrapper, if the model has one."""
    named = ((name, parameter) for name, parameter in model.named_parameters() if name.split(".")[-1] == NEWLINE)
    return next(named, None)


def train_newline(model: PreTrainedModel) -> torch.Tensor | None:
    """Train the newline of a model with PEFT's wrapper, if the adapter trains the projector.

    Returns:
        The newline as it is before training, or None if it is not trained.
    """
    found = newline_of(model)
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if found is None or "multi_modal_projector" not in trained:
        return None
    _, newline = found
    first = newline.detach().clone()
    newline.requires_grad_(True)
    return first


def save_newline(model: PreTrainedModel, folder: str, state_dict: dict[str, torch.Tensor] | None) -> None:
    """Add a trained newline to the adapter's weights in a folder.

    Args:
        model: with PEFT's wrapper.
        folder: where the adapter was saved.
        state_dict: of the whole model, if its parameters are split over processes.
    """
    found, path = newline_of(model), Path(folder, ADAPTER_WEIGHTS)
    if found is None or not found[1].requires_grad or not path.is_file():
        return
    name, newline = found
    value = newline if state_dict is None else state_dict[name]
    value = value.full_tensor() if isinstance(value, DTensor) else value
    save_file(load_file(path) | {name: value.detach().cpu().contiguous()}, path, metadata={"format": "pt"})


@contextmanager
def first_newline(model: PreTrainedModel, first: torch.Tensor | None) -> Iterator[None]:
    """Inside this context, the newline is as `train_newline` returned it."""
    found = None if first is None else newline_of(model)
    if found is None or first is None:
        yield
        return
    _, newline = found
    with torch.no_grad():
        trained = newline.clone()
        newline.copy_(first.to(newline))
    try:
        yield
    finally:
        with torch.no_grad():
            newline.copy_(trained)
