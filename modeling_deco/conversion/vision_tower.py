# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The vision tower of a checkpoint of the original code."""

import torch
from transformers import AutoConfig

from ..utils.errors import ConversionError
from ..utils.files import refusing
from .checkpoints import LlavaCheckpoint, add_tensors
from .layouts import COPIED_TOWER, VISION_TOWER
from .sources import Source
from .weights import StoredTensor


def read_vision_tower(checkpoint: LlavaCheckpoint, tower: Source, is_trained: bool) -> None:
    """The vision tower that the original code runs: the one in the checkpoint if it was trained, else the one that the
    config names. A frozen one in the checkpoint is a copy, rounded to the type that was trained in."""
    inside = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.vision_tower.")}
    if inside and is_trained:
        return
    named = LlavaCheckpoint("vision tower", None, {}, {}, {}, tower, tower)
    is_whole = "model.vision_tower.embeddings.patch_embedding.weight" in inside  # LoRA's trained biases alone are not
    try:
        add_tensors(named, tower.read_weights(), VISION_TOWER)
    except ConversionError:
        if is_whole:  # the copy is all there is
            return
        raise
    if is_whole and not all(_is_rounded(tensor, named.tensors.get(name)) for name, tensor in inside.items()):
        return
    checkpoint.dropped |= named.dropped | {tensor.key: COPIED_TOWER for tensor in inside.values()}
    checkpoint.files |= named.files
    checkpoint.tensors |= named.tensors


def _is_rounded(tensor: StoredTensor, original: StoredTensor | None) -> bool:
    if original is None or original.shape != tensor.shape:
        return False
    return torch.equal(original.read().to(tensor.dtype), tensor.read())


def read_vision_config(tower: Source):
    with refusing(f"config.json of --vision-tower {tower.name}"):
        config = AutoConfig.from_pretrained(tower.folder, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    config.name_or_path = ""  # a folder of this machine, maybe
    return config
